"""What a worker does besides training: records, saves, guards the loss, and stops when asked."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ftray.errors import DivergedError, FtrayError
from ftray.model.base import BaseModel
from ftray.tracking.events import SAVE_FAILED, SKIPPED, read_events, record_event
from ftray.train.checkpoints.saver import Publish, Saver, Upload
from ftray.train.engine.protocol import StepLoss, TrainingEngine
from ftray.train.hooks.profiler import StepProfiler
from ftray.train.hooks.watchdog import Watchdog
from ftray.train.job import SCRATCH, STOP_REQUEST, TrainJob
from ftray.train.loss_guard import GoBack, name_rows
from ftray.train.step_record import StepRecord

Record = Callable[[dict[str, Any]], None]


class WorkerCallbacks:
    """What the loop asks for, through the run directory."""

    def __init__(
        self,
        job: TrainJob,
        engine: TrainingEngine,
        base: BaseModel,
        *,
        record: Record,
        sample: Callable[[int], None],
        publish: Publish,
        upload: Upload,
        keep_notes: Callable[[], None],
        row_name: Callable[[int], str] = str,
    ):
        """`keep_notes`: brings what rank 0 noted to where the run lies. `row_name`: of a row of the data."""
        self._job = job
        self._row_name = row_name
        self._keep_notes = keep_notes
        self._sample = sample
        self._rank = rank = engine.rank
        self._profiler = StepProfiler(job.run_directory, num_steps=job.profile_steps, rank=rank)
        self._engine = engine
        self._record = record
        self._unreported: list[dict[str, Any]] = []  # events
        self._watchdog = Watchdog(job.run_directory, rank=rank, timeout_s=job.config.guard.hang_timeout_s)
        self._watchdog.beat()
        self._saver = Saver(
            engine,
            job.config,
            base,
            data_digest=job.data_digest,
            scratch=job.run_directory / SCRATCH,
            publish=publish,
            upload=upload,
            on_failure=self._on_failed_save,
        )

    def on_bad_loss(self, step: int, problem: str, rows: list[int]) -> None:
        self._saver.finish(last=False)  # what was saved before stands
        guard = self._job.config.guard
        described = (
            f"step {step}: {problem}; the rows {name_rows(rows, self._row_name)} of data.train were in the micro-batch"
        )
        skipped = self._engine.gather(skipped_steps(self._job.run_directory))[0]
        if guard.on_bad_loss == "stop":
            raise DivergedError(
                f"{described}. Look at them, lower optimizer.learning_rate, or set guard.on_bad_loss=skip; "
                "the last checkpoint stands"
            )
        if len(skipped) >= guard.max_skips:
            raise DivergedError(f"{described}, after {len(skipped)} skipped steps (guard.max_skips)")
        if self._rank == 0:
            record_event(self._job.run_directory, SKIPPED, step=step, problem=problem, rows=rows)
            with contextlib.suppress(FtrayError, OSError):  # then the step is met, and told, once more
                self._keep_notes()
        self._engine.gather(None)  # no rank ends, which would end them all, before it is noted
        raise GoBack(described)

    def on_step_end(self, record: StepRecord) -> None:
        self._watchdog.beat()
        self._profiler.step()
        self._record(record.as_dict())
        self._emit()
        self._saver.poll()

    def on_evaluated(self, step: int, evaluated: StepLoss) -> None:
        self._watchdog.beat()
        self._record({"step": step, **evaluated.as_record()})
        self._sample(step)
        self._watchdog.beat()

    def save(self, step: int) -> None:
        self._saver.begin(step)
        self._watchdog.beat()

    def should_stop(self, step: int) -> bool:
        asked = self._rank == 0 and (self._job.run_directory / STOP_REQUEST).is_file()
        asked = asked or step == self._job.until_step
        return self._engine.sum_over_ranks(float(asked)) > 0

    def close(self) -> None:
        self._profiler.close()
        self._saver.finish(last=True)
        self._saver.close()
        self._emit()
        self._watchdog.close()

    def _on_failed_save(self, step: int, message: str) -> None:
        if self._rank == 0:
            self._unreported.append({"kind": SAVE_FAILED, "step": step, "message": message})

    def _emit(self) -> None:
        """Writes the events that wait; on a full disk they wait on."""
        with contextlib.suppress(OSError):
            while self._unreported:
                record_event(self._job.run_directory, **self._unreported[0])
                self._unreported.pop(0)


def skipped_steps(run_directory: Path) -> frozenset[int]:
    """As the loop counts them: 0 for the first."""
    return frozenset(event["step"] - 1 for event in read_events(run_directory) if event["event"] == SKIPPED)
