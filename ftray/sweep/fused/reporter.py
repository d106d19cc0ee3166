"""Rank 0's side of a fused group: what the coordinator is told, and what the members' run directories hold."""

import contextlib
import functools
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from ftray.config import RunConfig
from ftray.errors import FtrayError, StoreError, UnwritableError
from ftray.sweep.fused.group import MemberStep, RowSharing
from ftray.sweep.fused.job import FusedJob
from ftray.sweep.fused.member import Member, save
from ftray.sweep.fused.member_run import MemberRun, member_run
from ftray.sweep.trial_run import Reporter, progress_of
from ftray.sweep.trials import Outcome, Report
from ftray.tracking.events import SAVE_FAILED, record_event
from ftray.train.checkpoints.listing import read_state
from ftray.train.engine.protocol import StepLoss
from ftray.train.hooks.recorder import Recorder
from ftray.train.job import STOP_REQUEST
from ftray.train.loss_guard import recent_losses
from ftray.train.prepared_data import PreparedData, num_steps
from ftray.train.runs.finalize import finalize_run
from ftray.train.runs.handle import check_same_data
from ftray.train.step_record import FlopsMeter, record_step


@dataclass(frozen=True)
class Assignment:
    """A run to take up, as rank 0 found it: a shared disk may show another rank another newest checkpoint."""

    config: RunConfig
    checkpoint: Path | str | None  # a URL where the run lies in an object store
    earlier_losses: tuple[float, ...]
    until_step: int | None


class GroupReporter:
    """Rank 0's paperwork: the coordinator, and the members' run directories."""

    def __init__(self, job: FusedJob, base: Any, data: PreparedData, *, meter: FlopsMeter):
        self._job = job
        self._base = base
        self._data = data
        self._meter = meter
        self._reporters: dict[str, Reporter] = {}
        self._runs: dict[str, MemberRun] = {}
        self._uploads: dict[str, Future[None]] = {}
        self._asked: set[str] = set()  # names of members that are to stop
        self._due: list[tuple[str, Report]] = []  # reports of this step, judged together
        self._began: dict[str, float] = {}
        self._reported_sharing = job.shares_rows is not None  # an earlier part of the sweep has told it
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="finish")
        self._finishing: list[Future[None]] = []
        ray.get(job.coordinator.start_over.remote(job.group))  # what its workers before these had begun

    def take(self, count: int) -> tuple[list[Assignment], bool]:
        """What the coordinator has, and whether it will have more. A run that has come to its end already, which was
        not noted, is reported and not taken up."""
        if count <= 0:
            return [], True
        taken: Any = ray.get(self._job.coordinator.take.remote(self._job.group, count))
        configs = [RunConfig.model_validate_json(text) for text in taken.runs]
        with self._pardoned():
            found = [self._assignment(c, taken.until_step, is_new=c.name in taken.new) for c in configs]
        return [assignment for assignment in found if assignment is not None], taken.waits or bool(taken.runs)

    @contextlib.contextmanager
    def _pardoned(self) -> Iterator[None]:
        """A full disk or a store that does not answer ends the group, and is no fault of the runs that it has."""
        try:
            yield
        except (OSError, StoreError, UnwritableError):
            ray.get(self._job.coordinator.pardon.remote(self._job.group))
            raise

    def _assignment(self, config: RunConfig, until_step: int | None, *, is_new: bool) -> Assignment | None:
        try:
            run = member_run(config, is_new=is_new)
            handle = run.handle
            if handle.finished is None and handle.resume_from is not None:
                check_same_data(handle.resume_from, self._job.data_digest)
        except (StoreError, UnwritableError):
            raise
        except FtrayError as error:
            self.refuse(config.name, str(error))
            return None
        checkpoint = handle.resume_from
        start = read_state(checkpoint).step if checkpoint is not None else 0
        if handle.finished is not None:
            self._end_at_once(config, "finished", num_steps=handle.finished["steps"])
            run.drop_checkpoints()
            return None
        if until_step is not None and until_step <= start < num_steps(config, self._data.train):
            self._end_at_once(config, "stopped", num_steps=0)
            return None
        (handle.path / STOP_REQUEST).unlink(missing_ok=True)
        losses = recent_losses(handle.path, until_step=start)
        self._runs[config.name] = run
        uri = handle.uri_of(checkpoint) if checkpoint is not None else None
        return Assignment(config, uri, tuple(losses), until_step)

    def _end_at_once(self, config: RunConfig, outcome: Outcome, *, num_steps: int) -> None:
        """Of a run that had come to its end, or to where it waits, which was not noted."""
        reporter = Reporter(config, metric=self._job.metric, on_report=functools.partial(self._emit, config.name))
        reporter.begin(num_steps)
        reporter.report_all()
        ray.get(self._job.coordinator.end.remote(config.name, outcome, None))

    def refuse(self, name: str, message: str) -> None:
        ray.get(self._job.coordinator.end.remote(name, "failed", message))

    def begin(self, member: Member) -> None:
        self._runs[member.name].begin()
        member.recorder = Recorder(member.config, member.directory, resume_step=member.step)
        put_off = functools.partial(self._put_off, member.name)
        reporter = Reporter(member.config, metric=self._job.metric, on_report=put_off)
        reporter.begin(member.num_steps)
        self._reporters[member.name] = reporter
        self._began[member.name] = time.time()
        reporter.report_all()

    def log(self, line: str) -> None:
        ray.get(self._job.coordinator.log.remote(line))

    def compare(self, sharing: RowSharing) -> None:
        """Tells, once it is known, whether sharing rows is faster."""
        if self._reported_sharing or sharing.is_faster is None:
            return
        self._reported_sharing = True
        shared, single = (max(sharing.rates[way]) for way in (True, False))
        way = "share rows" if sharing.is_faster else "have rows of their own"
        self.log(f"trials {way}: {shared:.0f} tokens/s shared, {single:.0f} each by itself")
        ray.get(self._job.coordinator.keep_sharing.remote(sharing.is_faster))

    def record(self, member: Member, reported: MemberStep) -> None:
        record = record_step(
            member.source.step(member.step - 1),
            self._meter,
            step=member.step,
            loss=reported.loss,
            metrics=reported.metrics,
            learning_rate=reported.learning_rate,
            grad_norm=reported.grad_norm,
            seconds=reported.seconds,
        )
        self._append(member, record.as_dict())

    def evaluated(self, member: Member, evaluated: StepLoss) -> None:
        self._append(member, {"step": member.step, **evaluated.as_record(), "time": time.time()})

    def stopping(self, members: list[Member]) -> list[str]:
        """By the study, or by the user."""
        while self._due:  # one that resumed may have several
            together = dict(reversed(self._due))  # of each its first
            self._due = [reported for reported in self._due if together[reported[0]] is not reported[1]]
            self._asked.update(ray.get(self._job.coordinator.report.remote(together)))
        return [m.name for m in members if m.name in self._asked or (m.directory / STOP_REQUEST).is_file()]

    def save(self, member: Member, *, must: bool) -> None:
        """One that fails, on a full disk, is told and left out, unless others go on from it."""
        if (upload := self._uploads.pop(member.name, None)) is not None:
            upload.result()  # of the save before, which this one may remove
        try:
            with self._pardoned():
                save(member, self._base, data_digest=self._job.data_digest)
        except OSError as error:
            if must:
                raise
            note_failed_save(member.directory, member.step, error)
            return
        if not member.is_done:  # then its result follows at once
            run = self._runs[member.name]
            self._uploads[member.name] = self._writer.submit(self._upload, run, member.directory, member.step)

    def _upload(self, run: MemberRun, directory: Path, step: int) -> None:
        """Beside the training."""
        try:
            run.keep(step)
        except (OSError, FtrayError) as error:
            note_failed_save(directory, step, error)

    def end(self, member: Member, outcome: str, message: str | None) -> None:
        """The result is written beside the training of the others."""
        del self._reporters[member.name]
        self._finishing.append(self._writer.submit(self._finish, member, outcome, message))

    def raise_failures(self) -> None:
        """Of results that could not be written or told: nobody would hear of these members again."""
        done = [future for future in self._finishing if future.done()]
        self._finishing = [future for future in self._finishing if not future.done()]
        with self._pardoned():
            for future in done:
                future.result()

    def close(self) -> None:
        with self._pardoned():
            for future in self._finishing:
                future.result()
        self._writer.shutdown()

    def _finish(self, member: Member, outcome: str, message: str | None) -> None:
        assert member.recorder is not None
        member.recorder.close()
        run = self._runs.pop(member.name)
        run.stop_noting()
        if outcome == "finished":
            seconds = time.time() - self._began[member.name]
            checkpoint = run.last_checkpoint()
            if checkpoint is None:
                raise FtrayError(f"{run.handle.uri}: ended without a checkpoint")
            finalize_run(run.handle, checkpoint, self._base, self._data, seconds=seconds)
            run.drop_checkpoints()
        progress = progress_of(member.directory)
        run.leave()
        ray.get(self._job.coordinator.end.remote(member.name, outcome, message, progress))

    def _append(self, member: Member, record: dict[str, Any]) -> None:
        assert member.recorder is not None
        member.recorder.record(record)
        self._reporters[member.name].report_news([record])

    def _put_off(self, name: str, report: Report) -> None:
        """Until the end of the step, when the reports of all members are judged together."""
        self._due.append((name, report))

    def _emit(self, name: str, report: Report) -> None:
        self._asked.update(ray.get(self._job.coordinator.report.remote({name: report})))


class SilentReporter:
    """Of every rank but 0: it takes what rank 0 takes, and keeps nothing."""

    def take(self, count: int) -> Any: ...

    def refuse(self, name: str, message: str) -> None: ...

    def begin(self, member: Member) -> None: ...

    def log(self, line: str) -> None: ...

    def compare(self, sharing: RowSharing) -> None: ...

    def record(self, member: Member, reported: MemberStep) -> None: ...

    def evaluated(self, member: Member, evaluated: StepLoss) -> None: ...

    def stopping(self, members: list[Member]) -> Any: ...

    def save(self, member: Member, *, must: bool) -> None: ...

    def end(self, member: Member, outcome: str, message: str | None) -> None: ...

    def raise_failures(self) -> None: ...

    def close(self) -> None: ...


def note_failed_save(directory: Path, step: int, error: Exception) -> None:
    with contextlib.suppress(OSError):
        record_event(directory, SAVE_FAILED, step=step, message=str(error))
