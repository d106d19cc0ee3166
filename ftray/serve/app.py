"""The Ray Serve application: one ingress deployment over engine replicas. Ray is here and nowhere else in `serve/`."""

import asyncio
import logging
import os
import uuid
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve._private.logging_utils import get_serve_logs_dir  # no public one
from ray.serve.config import HTTPOptions, ProxyLocation, RequestRouterConfig
from ray.serve.context import _get_global_client  # no public one
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ServeDeploySchema

from ftray.config import ServeConfig
from ftray.errors import FtrayError, UserError
from ftray.registry import Registry
from ftray.serve.http.api import make_api
from ftray.serve.http.context import Watcher
from ftray.serve.http.embeddings import Embeddings
from ftray.serve.http.ingress import Ingress
from ftray.serve.http.playground import Overview, RecentTraffic
from ftray.serve.http.ports import reachable
from ftray.serve.http.routes.paths import ANSWERING
from ftray.serve.http.services import Services
from ftray.serve.node_address import listen_on_node_address
from ftray.serve.replica.process_memory import (
    give_back_free_memory,
    keep_few_arenas,
    keep_out_of_collections,
)
from ftray.serve.replica.resources import replica_resources
from ftray.serve.routing.handles import Receipt, RemoteLedger, ReplicaBackend
from ftray.serve.routing.model_names import ModelNames
from ftray.serve.telemetry.access_log import AccessLog
from ftray.serve.telemetry.metrics import OF_REQUESTS
from ftray.serve.telemetry.ray_meter import RayMeter
from ftray.serve.telemetry.request_metrics import RequestMetrics
from ftray.serve.tenants.accounts import Accounts, Tenant, Usage
from ftray.serve.tenants.auth import Authenticator
from ftray.serve.tenants.rate_limits import RateLimiter, Refusal

log = logging.getLogger("ftray.serve")

APP_NAME = "ftray"
# Above the engine's own queue, so that the engine, which knows its load, is the one that answers 429.
SPARE_REQUESTS = 64
STATS_PERIOD_S = 1.0
AT_ONCE_S = 1.0  # a disk takes a row within it; else an answer goes out before its row
HEALTH_PERIOD_S = 5.0
LOOK_BACK_S = 5.0  # the load is the mean of so long
# By name, imported in the replicas alone: driver, ingress and ledger run without torch.
REPLICA = "ftray.serve.replica.deployment.ReplicaDeployment"
LOGGING = {"log_level": "WARNING", "enable_access_log": False}


class LedgerDeployment:
    """The rate limiter and the ledger, one for the endpoint. It reads and writes in threads: nobody's key waits for
    another's usage."""

    def __init__(self, database: str):
        listen_on_node_address()
        self._limiter = RateLimiter(Accounts(database))
        self._instance = uuid.uuid4().hex

    async def admit(self, key: str | None) -> Tenant | Refusal:
        return await asyncio.to_thread(self._limiter.admit, key)

    async def identify(self, key: str | None) -> Tenant | None:
        return await asyncio.to_thread(self._limiter.identify, key)

    async def record(self, usages: list[Usage]) -> Receipt:
        """Waits for the disk as long as it takes them at once."""
        written = [self._limiter.record(usage) for usage in usages]
        wait_s = 0.0 if self._limiter.writer.is_failing else AT_ONCE_S
        _, left = await asyncio.wait([asyncio.wrap_future(row) for row in written], timeout=wait_s)
        return Receipt(self._instance, is_written=not left)

    def __del__(self) -> None:
        self._limiter.writer.close()


class IngressApp:
    """`serve.ingress` makes a deployment of it: Ray Serve asks for the HTTP application once it is made."""

    def __init__(self, config: ServeConfig, replicas: DeploymentHandle, ledger: DeploymentHandle | None):
        listen_on_node_address()
        keep_few_arenas()
        self._config = config
        names = ModelNames(config.served_name or config.base_model, Registry(config.adapters.registry, tolerant=True))
        backend = ReplicaBackend(replicas)
        auth = Authenticator(RemoteLedger(ledger) if ledger is not None else None)
        self._ingress = Ingress(names, backend, auth, timeout_s=config.limits.request_timeout_s)
        self._embeddings = Embeddings(names, backend, auth, timeout_s=config.limits.request_timeout_s)
        self._traffic = RecentTraffic()
        self._overview = Overview(names, backend, auth, self._traffic)
        keep_out_of_collections()

    def check_health(self) -> None:
        """Ray Serve calls it every few seconds."""
        give_back_free_memory()

    def __serve_build_asgi_app__(self) -> Any:
        watchers = [self._traffic, *watchers_of(self._config)]
        services = Services(self._ingress, self._embeddings, self._overview)
        return make_api(services, self._config, watchers=watchers)


def ray_log_directory() -> Path:
    """Where Ray Serve keeps its own logs on this node, and log collectors look."""
    return Path(get_serve_logs_dir())


def watchers_of(config: ServeConfig) -> list[Watcher]:
    telemetry = config.telemetry
    directory = Path(telemetry.access_log) if telemetry.access_log is not None else ray_log_directory()
    watchers: list[Watcher] = [
        RequestMetrics(RayMeter(OF_REQUESTS), paths=ANSWERING),
        AccessLog(directory / f"ftray-access-{os.getpid()}.jsonl"),
    ]
    if telemetry.otlp_endpoint is not None:
        from ftray.serve.telemetry.tracing import otlp_traces

        watchers.append(otlp_traces(telemetry.otlp_endpoint, paths=ANSWERING))
    return watchers


def build_app(config: ServeConfig) -> serve.Application:
    config = with_absolute_paths(config)
    replicas = config.replicas
    scaling: dict[str, Any] = {"num_replicas": replicas.min}
    if replicas.max > replicas.min:
        scaling = {
            "autoscaling_config": {
                "min_replicas": replicas.min,
                "max_replicas": replicas.max,
                "target_ongoing_requests": config.engine.max_sequences,
                "upscale_delay_s": replicas.upscale_delay_s,
                "downscale_delay_s": replicas.downscale_delay_s,
                "look_back_period_s": LOOK_BACK_S,
                "metrics_interval_s": STATS_PERIOD_S,
            }
        }
    router: Any = {
        "request_router_class": "ftray.serve.routing.router.WarmFirstRouter",
        "request_router_kwargs": {"spread_at": config.engine.max_sequences},
        "request_routing_stats_period_s": STATS_PERIOD_S,
    }
    as_replica = serve.deployment(
        name="engine",
        max_ongoing_requests=config.engine.max_sequences + config.engine.max_waiting + SPARE_REQUESTS,
        user_config={},
        health_check_period_s=HEALTH_PERIOD_S,
        graceful_shutdown_timeout_s=replicas.drain_s,
        max_surge_percent=replicas.max_surge_percent,
        request_router_config=RequestRouterConfig(**router),
        **replica_resources(config),
        **scaling,
    )
    engine = as_replica(REPLICA)  # pyright: ignore[reportArgumentType]  Ray Serve takes an import path as well
    ingress = serve.deployment(
        serve.ingress()(IngressApp),  # pyright: ignore[reportArgumentType]
        name="ingress",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=100_000,
        health_check_period_s=HEALTH_PERIOD_S,
        graceful_shutdown_timeout_s=replicas.drain_s,
        max_surge_percent=100,
    )
    ledger = None
    if config.tenants.database is not None:
        ledger = serve.deployment(
            LedgerDeployment,  # pyright: ignore[reportArgumentType]
            name="ledger",
            ray_actor_options={"num_cpus": 0},
            max_ongoing_requests=100_000,
        ).bind(config.tenants.database)
    return ingress.bind(config, engine.bind(config), ledger)


def app_of(arguments: dict[str, Any]) -> serve.Application:
    """What `serve deploy` and KubeRay's RayService import: `arguments` is a serve config."""
    return build_app(ServeConfig.model_validate(arguments))


def deploy_schema(config: ServeConfig) -> dict[str, Any]:
    """The endpoint as `serve deploy` takes it (Ray's `ServeDeploySchema`)."""
    schema = ServeDeploySchema.model_validate(
        {
            "proxy_location": "EveryNode",
            "http_options": {"host": config.host, "port": config.port},
            "logging_config": LOGGING,
            "applications": [
                {
                    "name": APP_NAME,
                    "route_prefix": "/",
                    "import_path": "ftray.serve.app:app_of",
                    "args": with_absolute_paths(config).model_dump(mode="json", exclude_defaults=True),
                }
            ],
        }
    )
    return schema.model_dump(mode="json", exclude_unset=True)


def with_absolute_paths(config: ServeConfig) -> ServeConfig:
    """Replicas have other working directories than the driver. The name that is served stays as it was written."""

    def absolute(location: str) -> str:
        return location if "://" in location else os.path.abspath(location)

    base = os.path.abspath(config.base_model) if os.path.exists(config.base_model) else config.base_model
    adapters = config.adapters.model_copy(update={"registry": absolute(config.adapters.registry)})

    def absolute_if_any(location: str | None) -> str | None:
        return None if location is None else absolute(location)

    return config.model_copy(
        update={
            "adapters": adapters,
            "base_model": base,
            "served_name": config.served_name or config.base_model,
            "tenants": config.tenants.model_copy(update={"database": absolute_if_any(config.tenants.database)}),
            "telemetry": config.telemetry.model_copy(
                update={"access_log": absolute_if_any(config.telemetry.access_log)}
            ),
        }
    )


def start_endpoint(config: ServeConfig) -> str:
    """Deploys the application and returns its URL once it answers. Needs a Ray session."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(
        proxy_location=ProxyLocation.HeadOnly,
        http_options=HTTPOptions(host=config.host, port=config.port),
        logging_config=LOGGING,
    )
    check_running_port(config.port)
    try:
        serve.run(build_app(config), name=APP_NAME, route_prefix="/", logging_config={"log_level": "WARNING"})
    except RuntimeError as error:
        raise FtrayError(f"the endpoint did not start: {deployment_message() or error}") from None
    return f"http://{reachable(config.host)}:{config.port}"


def deployment_message() -> str | None:
    """What the failed deployment says of itself, last line first."""
    application = serve.status().applications.get(APP_NAME)
    if application is None:
        return None
    messages = [d.message for d in application.deployments.values() if d.message]
    return messages[0].strip().splitlines()[-1] if messages else None


def check_running_port(port: int) -> None:
    """A Serve that runs already keeps the port that it was started with."""
    client = _get_global_client()
    assert client is not None
    running = client.http_config.port
    if running != port:
        raise UserError(
            f"port: {port} is asked for, but Ray Serve runs on this cluster with port {running} already, and has one "
            f"for all; use port={running}, or end it for everybody (`serve shutdown`)"
        )


def is_deployed() -> bool:
    return ray.is_initialized() and APP_NAME in serve.status().applications


def stop_endpoint() -> None:
    """The application goes, once what it has begun is answered. Serve itself stays: on a cluster it may be somebody
    else's, and a session of our own ends with `ray.shutdown`."""
    if is_deployed():
        try:
            serve.delete(APP_NAME)  # waits: a process that ends at once may take its request along
        except TimeoutError:
            print("the endpoint still ends what it has begun (replicas.drain_s); it goes by itself", flush=True)
