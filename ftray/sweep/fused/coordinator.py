"""Fused trials from the driver's side: a coordinator, which knows the study, and process groups that take its runs."""

import contextlib
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray._private.state import available_resources_per_node  # no public one
from ray.exceptions import RayError
from ray.train import CheckpointConfig, FailureConfig, RunConfig as RayRunConfig, ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from ftray.cluster.fit_thread import Fit, last_line
from ftray.cluster.resources import fitting_groups, pinned_to
from ftray.cluster.worker_env import passed_secrets, worker_environment
from ftray.config import RunConfig, Space, SweepConfig
from ftray.errors import FtrayError
from ftray.storage import read_json, write_json
from ftray.sweep.fused.eligibility import fusing_of
from ftray.sweep.fused.entry import run_fused_in_worker
from ftray.sweep.fused.job import FusedJob
from ftray.sweep.report.report import LivePage
from ftray.sweep.report.text import describe_end
from ftray.sweep.study import Study
from ftray.sweep.trials import NOTHING_DONE, Outcome, Progress, Report
from ftray.train.hooks.watchdog import HangReader
from ftray.train.on_ray.controller_notes import unkept_notes
from ftray.train.on_ray.process_group import process_group_of
from ftray.train.on_ray.trainer import bundle_of, set_ray_train
from ftray.train.runs.rank_directory import HangsOfGroup, new_attempt
from ftray.train.runs.uri import is_stored

Log = Callable[[str], None]
POLL_S = 0.2
TRAIN_DIRECTORY = "ray-train"
SHARING = "sharing.json"
MAX_HAND_OUTS = 3


@dataclass(frozen=True)
class Taken:
    runs: list[str]  # JSON of their configs
    new: frozenset[str]  # names of those that the study has heard nothing of
    until_step: int | None  # they save there, and wait for others
    waits: bool  # there will be more when others have come so far


class TrialCoordinator:
    """The study, in an actor on the driver's node: it alone writes the journal."""

    def __init__(self, config: SweepConfig, space: Space, directory: Path):
        self._study = Study(config, space, directory)
        self._directory = directory
        self._fusing = fusing_of(config, space)
        self._lines: list[str] = []
        self._num_ended = 0
        self._taken: dict[int, set[str]] = {}  # names of runs, by group
        self._handed_out: Counter[str] = Counter()

    def start_over(self, group: int) -> None:
        """What this group had and has not ended is handed out again: its workers have died."""
        self._study.take_back(self._taken.pop(group, set()))

    def take(self, group: int, count: int) -> Taken:
        """So many runs at most. Of those whose group has died a group takes one at a time, and nobody else until that
        one has got on, so that the one that kills it is found."""
        taken, new = [], set()
        while len(taken) < count and not self._has_suspect(group):
            run = self._study.next_run(self._fusing.holds)
            if run is None:
                break
            self._handed_out[run.name] += 1
            if self._handed_out[run.name] > MAX_HAND_OUTS:  # it may be what kills its group
                self.end(run.name, "failed", f"its workers died {MAX_HAND_OUTS} times")
                continue
            self._taken.setdefault(group, set()).add(run.name)
            taken.append(self._study.config_of(run).model_dump_json())
            if run.last is None:
                new.add(run.name)
        return Taken(taken, frozenset(new), self._study.until_step, waits=self._study.waits)

    def _has_suspect(self, group: int) -> bool:
        return any(self._handed_out[name] > 1 for name in self._taken.get(group, ()))

    def pardon(self, group: int) -> None:
        """Its workers die of something else than the runs that they have."""
        for name in self._taken.get(group, ()):
            self._handed_out[name] = 0

    def log(self, line: str) -> None:
        self._lines.append(line)

    def keep_sharing(self, is_faster: bool) -> None:
        write_json(self._directory / SHARING, {"shares_rows": is_faster})

    def report(self, reports: dict[str, Report]) -> list[str]:
        """Of runs at the same moment. Returns those that are to stop."""
        news = [name for name, report in reports.items() if self._study.is_news(name, report)]
        reasons = self._study.report_together(reports)
        for name in news:
            self._handed_out[name] = 1  # it gets on, so it is not what kills its group
            report = reports[name]
            self._lines.append(f"{name}  step {report.step}  {self._study.config.search.metric} {report.value:.4f}")
        stopped = {name: reason for name, reason in reasons.items() if reason is not None}
        self._lines += [f"{name}  {reason}" for name, reason in stopped.items()]
        return list(stopped)

    def end(self, name: str, outcome: Outcome, message: str | None, progress: Progress = NOTHING_DONE) -> None:
        self._lines.append(describe_end(self._study, self._study.end(name, outcome, message, progress=progress)))
        del self._handed_out[name]  # its workers have lived
        for taken in self._taken.values():
            taken.discard(name)
        self._num_ended += 1

    def news(self) -> tuple[list[str], int]:
        """Lines since the last look, and how many runs have ended."""
        lines, self._lines = self._lines, []
        return lines, self._num_ended


def run_fused(
    study: Study,
    directory: Path,
    job: dict[str, Any],
    *,
    slots_of_groups: Sequence[int],
    log: Log,
    on_news: LivePage,
) -> None:
    """`job`: what of a `FusedJob` the caller knows. Until the study has no more."""
    coordinator = start_coordinator(study, directory)
    shutil.rmtree(directory / TRAIN_DIRECTORY, ignore_errors=True)
    kept = read_json(directory / SHARING)["shares_rows"] if (directory / SHARING).is_file() else None
    attempt = new_attempt()
    groups = [
        Group(
            FusedJob(
                attempt=attempt,
                metric=study.config.search.metric,
                directory=directory / TRAIN_DIRECTORY / f"group-{number}",
                uri=f"{study.uri}/{TRAIN_DIRECTORY}/group-{number}",
                group=number,
                slots=slots,
                coordinator=coordinator,
                shares_rows=kept,
                **job,
            )
        )
        for number, slots in enumerate(slots_of_groups)
    ]
    known = 0
    while any(group.is_alive for group in groups):
        time.sleep(POLL_S)
        lines, num_ended = news_of(coordinator)
        for line in [*lines, *(line for group in groups for line in group.look())]:
            log(line)
        if lines or num_ended != known:
            on_news(has_ended=num_ended != known)
            known = num_ended
    for line in news_of(coordinator)[0]:
        log(line)
    with contextlib.suppress(RayError):
        ray.kill(coordinator)
    failures = [group.failure for group in groups if group.failure is not None]
    if failures and not Study(study.config, study.space, directory, is_driver=False).is_over:
        raise FtrayError(f"the fused group failed: {last_line(failures[0])}") from failures[0]


def start_coordinator(study: Study, directory: Path) -> Any:
    """The actor's handle."""
    here = pinned_to(ray.get_runtime_context().get_node_id())
    actor: Any = ray.remote(num_cpus=0, max_restarts=0)(TrialCoordinator)
    return actor.options(scheduling_strategy=here).remote(study.config, study.space, directory)


def news_of(coordinator: Any) -> tuple[list[str], int]:
    try:
        return ray.get(coordinator.news.remote())
    except RayError as error:
        raise FtrayError(f"the sweep's coordinator died ({type(error).__name__}); the same command goes on") from None


class Group:
    """The processes of a fused group, as the driver follows them."""

    def __init__(self, job: FusedJob):
        self._job = job
        self._stored_hangs = HangsOfGroup(job.uri, job.directory)
        self._hangs = HangReader(job.directory)
        self._has_given_back = False
        self._fit = Fit(make_group(job))

    @property
    def is_alive(self) -> bool:
        return self._fit.is_alive()

    @property
    def failure(self) -> BaseException | None:
        return self._fit.failure

    def look(self) -> list[str]:
        """What is to be told. What a group that failed had, the others go on with."""
        self._stored_hangs.sync()
        if self.failure is not None and not self._has_given_back:
            self._has_given_back = True
            ray.get(self._job.coordinator.start_over.remote(self._job.group))
        hang = self._hangs.poll(world_size=self._job.base_run.workers.max_count)
        return [f"{self._job.directory.name}: {hang}; its workers start again"] if hang is not None else []


def make_group(job: FusedJob) -> DataParallelTrainer:
    workers = job.base_run.workers
    set_ray_train(workers.max_count)
    return DataParallelTrainer(
        run_fused_in_worker,
        train_loop_config={"job": job, "secrets": passed_secrets()},
        backend_config=process_group_of(workers),
        scaling_config=ScalingConfig(
            num_workers=workers.max_count, use_gpu=workers.gpus_each > 0, resources_per_worker=bundle_of(workers)
        ),
        run_config=RayRunConfig(
            name=job.directory.name,
            storage_path=str(job.directory.parent),
            storage_filesystem=unkept_notes() if is_stored(job.uri) else None,
            failure_config=FailureConfig(max_failures=workers.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            worker_runtime_env={"env_vars": worker_environment(workers.gpus_each)},
        ),
    )


def groups_of(base_run: RunConfig) -> tuple[RunConfig, int]:
    """The run with a group's workers, and how many groups the cluster holds. Without GPUs a group takes a node's cores:
    more groups on it would hold the base more often, and be no faster."""
    workers, nodes = base_run.workers, list(available_resources_per_node().values())
    if not workers.gpus_each and isinstance(workers.count, int):
        # Others may have taken some for good, on every node.
        free = max(int(node.get("CPU", 0)) for node in nodes)
        each = max(workers.cpus_each, free // workers.count)
        workers = workers.model_copy(update={"cpus_each": each})
    return base_run.model_copy(update={"workers": workers}), fitting_groups(workers, nodes)
