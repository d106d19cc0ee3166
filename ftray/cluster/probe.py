"""Do the nodes that may get a worker agree on files, packages and time?"""

import contextlib
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from ftray.cluster.resources import nodes_for, pinned_to
from ftray.config.run import WorkersConfig
from ftray.errors import UserError
from ftray.tracking.environment import describe_environment

PROBE_TIMEOUT_S = 120.0  # a node may still be unpacking the job's working directory
MAX_CLOCK_DIFFERENCE_S = 30.0


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
        here = pinned_to(node["NodeID"])
        tasks.append(ask.options(scheduling_strategy=here).remote(node["NodeManagerAddress"], *arguments))
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
