"""The Ray Serve application: one ingress deployment over engine replicas. Ray is here and nowhere else in `serve/`."""

import contextlib
import errno
import logging
import os
import socket
from collections.abc import AsyncIterator
from typing import Any

import ray
from ray import serve
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.handle import DeploymentHandle

from ftray.config import ServeConfig
from ftray.errors import FtrayError, UserError
from ftray.infer.engines import check_engine
from ftray.model.base import check_base_name, prepare_base
from ftray.registry import Registry
from ftray.serve.ingress import Ingress, make_api
from ftray.serve.models import ModelNames
from ftray.serve.replica import EngineReplica, Event, GenerateJob
from ftray.serve.schemas import ChatRequest, CompletionRequest

APP_NAME = "ftray"
# Above the engine's own queue, so that the engine, which knows its load, is the one that answers 429.
SPARE_REQUESTS = 64


class ReplicaBackend:
    """The replicas behind a Ray Serve handle."""

    def __init__(self, handle: DeploymentHandle):
        self._handle = handle
        self._streaming: Any = handle.options(stream=True)

    async def complete(self, job: GenerateJob) -> Event:
        return await self._handle.complete.remote(job)

    async def stream(self, job: GenerateJob) -> AsyncIterator[Event]:
        async for event in self._streaming.generate.remote(job):
            yield event


api = make_api()


class ReplicaDeployment(EngineReplica):
    async def reconfigure(self, _: Any) -> None:
        """Ray Serve calls it before the replica takes requests."""
        await self.preload()

    def __del__(self) -> None:
        """Ray Serve calls it when the replica goes."""
        with contextlib.suppress(AttributeError):  # it was never whole
            self.close()


@serve.ingress(api)
class IngressDeployment:
    def __init__(self, config: ServeConfig, replicas: DeploymentHandle):
        self._ingress = Ingress(
            ModelNames(config.served_name or config.base_model, Registry(config.adapters.registry)),
            ReplicaBackend(replicas),
        )

    @api.post("/v1/chat/completions")
    async def chat_completions(self, request: ChatRequest) -> Any:
        return await self._ingress.chat(request)

    @api.post("/v1/completions")
    async def completions(self, request: CompletionRequest) -> Any:
        return await self._ingress.completion(request)

    @api.get("/v1/models")
    async def models(self) -> Any:
        return await self._ingress.models()

    @api.get("/healthz")
    async def health(self) -> Any:
        return {"status": "ok"}


def build_app(config: ServeConfig) -> serve.Application:
    replicas = config.replicas
    scaling: dict[str, Any] = {"num_replicas": replicas.min}
    if replicas.max > replicas.min:
        scaling = {
            "autoscaling_config": {
                "min_replicas": replicas.min,
                "max_replicas": replicas.max,
                "target_ongoing_requests": config.engine.max_sequences,
            }
        }
    engine = serve.deployment(
        ReplicaDeployment,  # pyright: ignore[reportArgumentType]
        name="engine",
        ray_actor_options={"num_cpus": replicas.cpus_each, "num_gpus": replicas.gpus_each},
        max_ongoing_requests=config.engine.max_sequences + config.engine.max_waiting + SPARE_REQUESTS,
        user_config={},
        health_check_period_s=5,
        **scaling,
    )
    ingress = serve.deployment(
        IngressDeployment,  # pyright: ignore[reportArgumentType]
        name="ingress",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=100_000,
    )
    return ingress.bind(with_absolute_paths(config), engine.bind(with_absolute_paths(config)))


def with_absolute_paths(config: ServeConfig) -> ServeConfig:
    """Replicas have other working directories than the driver. The name that is served stays as it was written."""
    location = config.adapters.registry
    registry = location if "://" in location else os.path.abspath(location)
    base = os.path.abspath(config.base_model) if os.path.exists(config.base_model) else config.base_model
    adapters = config.adapters.model_copy(update={"registry": registry})
    served_name = config.served_name or config.base_model
    return config.model_copy(update={"adapters": adapters, "base_model": base, "served_name": served_name})


def check_endpoint(config: ServeConfig) -> None:
    """Everything that can be known before ray starts: base, preloaded adapters, port."""
    check_base_name(config.base_model)
    check_engine(config.engine)
    registry = Registry(config.adapters.registry)
    if config.adapters.preload:
        base = prepare_base(config.base_model)
        from ftray.serve.replica import check_base

        for reference in config.adapters.preload:
            version = registry.get(reference)
            check_base(str(version), version.metadata, base)
    check_port(config.host, config.port)


def check_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise UserError(f"port: {port} on {host} is in use; choose another with port=NUMBER") from None
            raise UserError(f"host: {host}:{port} cannot be listened on: {error.strerror}") from None


def start_endpoint(config: ServeConfig) -> str:
    """Deploys the application and returns its URL once it answers. Needs a Ray session."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(
        proxy_location=ProxyLocation.HeadOnly,
        http_options=HTTPOptions(host=config.host, port=config.port),
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )
    try:
        serve.run(build_app(config), name=APP_NAME, route_prefix="/", logging_config={"log_level": "WARNING"})
    except RuntimeError as error:
        raise FtrayError(f"the endpoint did not start: {deployment_message() or error}") from None
    host = "127.0.0.1" if config.host == "0.0.0.0" else config.host
    return f"http://{host}:{config.port}"


def deployment_message() -> str | None:
    """What the failed deployment says of itself, last line first."""
    application = serve.status().applications.get(APP_NAME)
    if application is None:
        return None
    messages = [d.message for d in application.deployments.values() if d.message]
    return messages[0].strip().splitlines()[-1] if messages else None


def stop_endpoint(*, wait: bool = True) -> None:
    """The application goes, once what it has begun is answered. Serve itself stays: on a cluster it may be somebody
    else's, and a session of our own ends with `ray.shutdown`."""
    if ray.is_initialized() and APP_NAME in serve.status().applications:
        serve.delete(APP_NAME, _blocking=wait)
