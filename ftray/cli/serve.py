"""`ftray serve`"""

import json
import threading
from typing import Annotated

import typer

from ftray.cli.arguments import ConfigFile, DryRun, Overrides
from ftray.config import ServeConfig, load_config, to_yaml


def serve(
    config: ConfigFile,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    detach: Annotated[
        bool, typer.Option("--detach", help="On a running cluster: leave the endpoint up when this command ends.")
    ] = False,
    print_deploy: Annotated[
        bool, typer.Option("--print-deploy", help="Print it for `serve deploy` or KubeRay's RayService, then stop.")
    ] = False,
) -> None:
    """Serve a base model and every adapter of a registry over an OpenAI-compatible API, until Ctrl-C."""
    settings: ServeConfig = load_config(config, overrides or (), kind="serve")
    from ftray.cluster.address import check_address
    from ftray.infer.engines import check_engine
    from ftray.serve.checks import check_endpoint

    if print_deploy:
        from ftray.serve.app import deploy_schema

        print(to_yaml(deploy_schema(settings)), end="")
        return
    if not dry_run:  # a plan needs no engine
        check_address()
        check_engine(settings.engine)
    check_endpoint(settings)
    if dry_run:
        show_plan(settings)
        return
    run_endpoint(settings, detach=detach)


def run_endpoint(settings: ServeConfig, *, detach: bool) -> None:
    import ray

    from ftray.cluster.session import start_ray
    from ftray.cluster.signals import stoppable
    from ftray.errors import UserError
    from ftray.serve.app import start_endpoint, stop_endpoint
    from ftray.serve.http.ports import in_url

    print(f"starting {settings.base_model} on {in_url(settings.host)}:{settings.port}", flush=True)
    if settings.tenants.database is None and not settings.is_local:
        print(f"open: true: whoever reaches {settings.host} may ask anything", flush=True)
    stopped = threading.Event()
    with stoppable() as stop:
        joined = start_ray()
        stop.take_over()
        if detach and not joined:
            ray.shutdown()
            raise UserError(
                "--detach: there is no running cluster to leave the endpoint on; `ray start --head` makes one"
            )
        leave = False
        try:
            url = start_endpoint(settings)  # a signal ends it, which may take minutes
            stop.saves_by(stopped.set)
            print(f"ready: {url}/v1", flush=True)
            print(f"  models: curl -s {url}/v1/models", flush=True)
            print(f"  ask:    {curl_line(url, settings.served_name or settings.base_model)}", flush=True)
            leave = detach
            if not detach:
                stopped.wait()
                print("stopping", flush=True)
        finally:
            if not leave:
                stop_endpoint()
            ray.shutdown()


def curl_line(url: str, model: str, message: str = "Hello!", *, system: str | None = None) -> str:
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": message})
    body = json.dumps({"model": model, "messages": messages, "max_tokens": 32, "temperature": 0}, ensure_ascii=False)
    return f"curl -s {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'"


def show_plan(settings: ServeConfig) -> None:
    from ftray.infer.engines import has_engine
    from ftray.registry import Registry
    from ftray.serve.http.ports import in_url
    from ftray.serve.replica.resources import resources_text
    from ftray.serve.routing.model_names import ModelNames
    from ftray.serve.tenants.database import without_password

    database = settings.tenants.database
    shown = settings.model_dump(mode="json")
    shown["tenants"]["database"] = without_password(database) if database is not None else None
    print(to_yaml(shown))
    names = ModelNames(settings.served_name or settings.base_model, Registry(settings.adapters.registry)).names()
    print(f"# {resources_text(settings)}")
    if not has_engine(settings.engine):
        print("# vllm is not installed here; the nodes of the replicas need it: pip install 'ftray[vllm]'")
    print(f"# would serve on http://{in_url(settings.host)}:{settings.port}/v1: {', '.join(names)}")
