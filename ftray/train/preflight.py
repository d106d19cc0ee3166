"""Before any worker starts: does the cluster have what the run asks for (Ray itself would wait for ever), and do its
nodes agree on files, packages and time?"""

import contextlib
import json
import math
import shutil
import struct
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ftray.config.run import RunConfig, WorkersConfig
from ftray.errors import UserError
from ftray.model.base import BaseModel
from ftray.storage import read_json
from ftray.tracking.environment import describe_environment

STATE_BYTES = 12  # of a trained weight in a checkpoint: float32 master and two moments
PROBE_TIMEOUT_S = 120.0  # a node may still be unpacking the job's working directory
MAX_CLOCK_DIFFERENCE_S = 30.0


def check_resources(workers: WorkersConfig, *, say: Callable[[str], None]) -> None:
    """Every worker must fit on a node beside those already placed there; raises `UserError` with what is missing."""
    need = need_of(workers)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fitting = sum(workers_that_fit(node, need) for node in nodes)
    if fitting >= workers.min_count:
        free = ray.available_resources()
        if any(free.get(name, 0) < amount * workers.min_count for name, amount in need.items()):
            say(
                f"the cluster is busy ({describe({name: free.get(name, 0) for name in need})} free): waits for its turn"
            )
        return
    have = {name: sum(float(node.get(name, 0)) for node in nodes) for name in need}
    raise UserError(
        f"workers.count: {workers.min_count} workers of {describe(need)} do not fit: the cluster has {len(nodes)} "
        f"node{'s' if len(nodes) != 1 else ''} with {describe(have)} in all, room for {fitting}; "
        "lower workers.count (or cpus_each, gpus_each), or add nodes"
    )


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


@dataclass(frozen=True)
class NodeReport:
    """What one node sees."""

    address: str
    probe: str | None  # content of the probe file, None where it is not to be seen
    packages: dict[str, str | None]
    clock: float


def check_nodes(run_directory: Path | None, workers: WorkersConfig) -> None:
    """Asks every node that may get a worker; raises `UserError` naming the one that differs. One node needs none.
    `run_directory`: which all must see; None: it lies in an object store."""
    nodes = nodes_for(workers)
    here = ray.get_runtime_context().get_node_id()
    if all(node["NodeID"] == here for node in nodes):
        return
    with probe_in(run_directory) as (probe, token):
        asked = time.time()
        reports = ask_nodes(nodes, report_node, probe)
        answered = time.time()
    if failure := next((report for report in reports if isinstance(report, UserError)), None):
        raise failure
    compare_nodes(reports, token, run_directory, asked=asked, answered=answered)


@contextlib.contextmanager
def probe_in(directory: Path | None) -> Iterator[tuple[Path | None, str | None]]:
    """A file for other nodes to read, and its content."""
    if directory is None:
        yield None, None
        return
    probe, token = directory / "scratch" / "probe", uuid.uuid4().hex
    probe.write_text(token)
    try:
        yield probe, token
    finally:
        probe.unlink(missing_ok=True)


def ask_nodes(nodes: list[dict[str, Any]], question: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`question(address, *arguments)` on each node; its answer, or a `UserError` that says why there is none."""
    ask: Any = ray.remote(num_cpus=0, max_retries=0)(question)
    tasks = []
    for node in nodes:
        affinity = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
        tasks.append(ask.options(scheduling_strategy=affinity).remote(node["NodeManagerAddress"], *arguments))
    answered, _ = ray.wait(tasks, num_returns=len(tasks), timeout=PROBE_TIMEOUT_S)
    return [
        answer_of(task, node["NodeManagerAddress"]) if task in answered else unanswered(node["NodeManagerAddress"])
        for task, node in zip(tasks, nodes, strict=True)
    ]


def answer_of(task: Any, address: str) -> Any:
    try:
        return ray.get(task)
    except RayError as error:
        reason = str(error).strip().splitlines()[-1]
        return UserError(f"node {address}: ftray does not run there: {reason}")


def unanswered(address: str) -> UserError:
    return UserError(f"node {address} does not answer within {PROBE_TIMEOUT_S:.0f} s; look at it with `ray status`")


def report_node(address: str, probe: Path | None) -> NodeReport:
    content = probe.read_text() if probe is not None and probe.is_file() else None
    return NodeReport(address, content, describe_environment()["packages"], time.time())


def compare_nodes(
    reports: list[NodeReport], token: str | None, run_directory: Path | None, *, asked: float, answered: float
) -> None:
    """`asked`, `answered`: this machine's clock before and after, between which every node looked at its own."""
    packages = describe_environment()["packages"]
    for report in reports:
        if report.probe != token:
            raise UserError(
                f"runs_dir: {run_directory} is not on storage that all nodes share: node {report.address} does not see "
                "a file that was just written there; give a shared path with runs_dir=PATH"
            )
        for name, version in packages.items():
            if report.packages[name] != version:
                raise UserError(
                    f"node {report.address} has {name} {report.packages[name]}, this machine {version}; install the "
                    "same versions everywhere (cluster/constraints.txt)"
                )
        if not asked - MAX_CLOCK_DIFFERENCE_S < report.clock < answered + MAX_CLOCK_DIFFERENCE_S:
            raise UserError(
                f"node {report.address}: its clock differs by {report.clock - answered:.0f} s; synchronise it (NTP)"
            )


def check_disk(config: RunConfig, base: BaseModel, run_directory: Path) -> None:
    """Room for the checkpoints that are kept, the one being written, and the result; raises `UserError`."""
    state = checkpoint_bytes(config, base)
    there = sum(1 for _ in (run_directory / "checkpoints").glob("step-*"))
    product = sum(path.stat().st_size for path in weight_files(base.directory)) if config.adapter is None else state
    need = state * max(1, config.checkpoint.keep + 1 - there) + product
    free = shutil.disk_usage(run_directory).free
    if free < need:
        raise UserError(
            f"runs_dir: {run_directory} has {free / 2**30:.1f} GiB free; {config.checkpoint.keep} checkpoints of "
            f"{state / 2**30:.1f} GiB, one more while it is written, and the result need {need / 2**30:.1f} GiB: make "
            "room, lower checkpoint.keep, or choose another runs_dir"
        )


def checkpoint_bytes(config: RunConfig, base: BaseModel) -> int:
    """Of one checkpoint, from the shapes in the base model's files; for LoRA as if every matrix got an adapter."""
    shapes = weight_shapes(base.directory)
    if config.adapter is None:
        return STATE_BYTES * sum(math.prod(shape) for shape in shapes.values())
    rank = max([config.adapter.rank, *config.adapter.rank_pattern.values()])
    whole = [
        math.prod(shape)
        for name, shape in shapes.items()
        if any(f".{saved}." in f".{name}" for saved in config.adapter.modules_to_save)
    ]
    adapters = [rank * sum(shape) for shape in shapes.values() if len(shape) == 2]
    return STATE_BYTES * (sum(whole) + sum(adapters))


def weight_files(directory: Path) -> list[Path]:
    """Those that transformers reads: a directory may hold the same weights in another form too."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        return [directory / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    whole = directory / "model.safetensors"
    return [whole] if whole.is_file() else sorted(directory.glob("*.safetensors"))


def weight_shapes(directory: Path) -> dict[str, list[int]]:
    """From the headers of the safetensors files: a length in 8 bytes, then JSON."""
    shapes = {}
    for path in weight_files(directory):
        try:
            with path.open("rb") as file:
                header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        except (OSError, struct.error, ValueError):
            raise UserError(f"base_model: {path} is no whole safetensors file; fetch it again") from None
        shapes |= {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
    return shapes
