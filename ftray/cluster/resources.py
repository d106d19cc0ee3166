"""Does the cluster have what a run asks for? Ray itself would wait for ever."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ftray.config.run import WorkersConfig
from ftray.errors import UserError


def pinned_to(node_id: str) -> NodeAffinitySchedulingStrategy:
    """For a task or an actor that is of no use on another node."""
    return NodeAffinitySchedulingStrategy(node_id=node_id, soft=False)


def check_resources(workers: WorkersConfig, *, log: Callable[[str], None]) -> None:
    """Every worker must fit on a node beside those already placed there; raises `UserError` with what is missing."""
    need = need_of(workers)
    refuse_unless_fitting(workers, [node["Resources"] for node in ray.nodes() if node["Alive"]])
    free = ray.available_resources()
    if any(free.get(name, 0) < amount * workers.min_count for name, amount in need.items()):
        log(f"the cluster is busy ({describe({name: free.get(name, 0) for name in need})} free): waits for its turn")


def refuse_unless_fitting(workers: WorkersConfig, nodes: Sequence[Mapping[str, float]], *, hint: str = "") -> None:
    need = need_of(workers)
    fitting = sum(workers_that_fit(node, need) for node in nodes)
    if fitting >= workers.min_count:
        return
    have = {name: sum(float(node.get(name, 0)) for node in nodes) for name in need}
    raise UserError(
        f"workers.count: {workers.min_count} workers of {describe(need)} do not fit: the cluster has {len(nodes)} "
        f"node{'s' if len(nodes) != 1 else ''} with {describe(have)} in all, room for {fitting}; "
        f"lower workers.count (or cpus_each, gpus_each), or add nodes{hint}"
    )


def check_own_session(workers: WorkersConfig) -> None:
    """What `check_resources` would find in a session of our own on this machine, before there is one."""
    from ray._private.accelerators import get_accelerator_manager_for_resource  # no public ones
    from ray._private.utils import get_num_cpus

    manager = get_accelerator_manager_for_resource("GPU")
    gpus = manager.get_current_node_num_accelerators() if manager is not None else 0
    here = [{"CPU": float(get_num_cpus()), "GPU": float(gpus)}]
    refuse_unless_fitting(workers, here, hint="; for a run on a cluster set RAY_ADDRESS, or look with `ftray plan`")


def fitting_groups(workers: WorkersConfig, nodes: Sequence[Mapping[str, float]] | None = None) -> int:
    """How many runs of so many workers the cluster holds at a time, at least one. `nodes`: what each has; None: all."""
    if nodes is None:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fitting = sum(workers_that_fit(node, need_of(workers)) for node in nodes)
    return max(1, fitting // workers.max_count)


def nodes_for(workers: WorkersConfig) -> list[dict[str, Any]]:
    """Those that may get a worker."""
    need = need_of(workers)
    return [node for node in ray.nodes() if node["Alive"] and workers_that_fit(node["Resources"], need) > 0]


def need_of(workers: WorkersConfig) -> dict[str, float]:
    return {"CPU": float(workers.cpus_each), "GPU": float(workers.gpus_each)}


def workers_that_fit(node: Mapping[str, float], need: dict[str, float]) -> int:
    return min(int(node.get(name, 0) // amount) for name, amount in need.items() if amount > 0)


def describe(resources: dict[str, float]) -> str:
    parts = [
        f"{amount:g} {name}{'s' if amount != 1 else ''}"
        for name, amount in resources.items()
        if amount or name == "CPU"
    ]
    return " and ".join(parts)
