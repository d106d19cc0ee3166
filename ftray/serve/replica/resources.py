"""What one replica asks of the cluster: CPUs and GPUs of a node or, if GPUs share the base, a placement group."""

from typing import Any

from ftray.config import ServeConfig
from ftray.config.engines import engine_kind


def replica_resources(config: ServeConfig) -> dict[str, Any]:
    """Options of Ray Serve's deployment.

    An engine that splits the base starts one worker in each bundle that has a GPU (vLLM takes no bundle of several).
    The replica, which talks to them, stands in the first and keeps the rest of its GPU, so that it sees of what kind
    they are. All of one node: workers read the base and the adapters that the replica has fetched.
    """
    replicas = config.replicas
    if config.engine.tensor_parallel == 1:
        return {"ray_actor_options": {"num_cpus": replicas.cpus_each, "num_gpus": replicas.gpus_each}}
    gpus_per_worker = engine_kind(config.engine.type).gpus_per_worker
    others = config.engine.tensor_parallel - 1
    return {
        "ray_actor_options": {"num_cpus": replicas.cpus_each, "num_gpus": round(1 - gpus_per_worker, 4)},
        "placement_group_bundles": [{"CPU": replicas.cpus_each, "GPU": 1}, *({"GPU": 1} for _ in range(others))],
        "placement_group_strategy": "STRICT_PACK",
    }


def resources_text(config: ServeConfig) -> str:
    replicas, split = config.replicas, config.engine.tensor_parallel
    count = f"{replicas.min}" if replicas.min == replicas.max else f"{replicas.min} to {replicas.max}"
    gpus = f" and {replicas.gpus_each:g} GPUs" if replicas.gpus_each else ""
    group = f", a placement group of {split} bundles, the base split over them" if split > 1 else ""
    return f"replicas: {count}, each of {replicas.cpus_each:g} CPUs{gpus} of one node{group}"
