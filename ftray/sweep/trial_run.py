"""One run of a trial, told as reports of the sweep's metric."""

import contextlib
import errno
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ftray.config import RunConfig
from ftray.errors import DivergedError, FtrayError, InterruptedRunError, StoreError, UserError
from ftray.sweep.trials import NOTHING_DONE, Progress, Report
from ftray.tracking.metrics import read_metrics
from ftray.train.job import WORKER_ERROR
from ftray.train.launch import launch
from ftray.train.on_ray.trainer import Watcher
from ftray.train.prepare import prepare
from ftray.train.runs.store import run_store

REFUSED = "refused"  # by the machine: a disk without room, a store that does not answer. Another time it may run
OnReport = Callable[[Report], None]


def run_to_end(
    config: RunConfig, *, metric: str, on_report: OnReport, until_step: int | None = None, is_new: bool = False
) -> tuple[str, str | None]:
    """Returns its outcome, and why where it did not finish. A run that was cut off goes on from its checkpoint. At
    `until_step` it saves and is stopped. `is_new`: its sweep has heard nothing of it."""
    store = run_store(config.runs_dir)
    reporter = Reporter(config, metric=metric, on_report=on_report)
    watcher = Watcher(
        log=lambda text: None,
        on_metrics=lambda records: reporter.report_news(records),
        on_start=lambda first, count: reporter.begin(count),
    )
    try:
        if is_new:
            store.forget_leftover(config)
        result = launch(prepare(config), watcher, until_step=until_step)
    except InterruptedRunError:
        reporter.report_all()  # where it had come there before, nothing was followed
        return "stopped", None
    except DivergedError as error:
        return "diverged", str(error)
    except UserError as error:
        workers_said = (store.local(config.name) / WORKER_ERROR).is_file()
        return ("failed" if workers_said else REFUSED), str(error)
    except StoreError as error:
        return REFUSED, str(error)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return REFUSED, str(error)
    except FtrayError as error:
        return "failed", str(error)
    reporter.begin(result["steps"])
    reporter.report_all()  # where it had finished before, nothing was followed
    with contextlib.suppress(StoreError):  # its result stands
        store.drop_checkpoints(config.name)  # many trials of many each would fill the disk
    return "finished", None


class Reporter:
    """Reads what is due from the run's own metrics, so that a run that resumes tells the same again."""

    def __init__(self, config: RunConfig, *, metric: str, on_report: OnReport):
        self._directory = run_store(config.runs_dir).local(config.name)
        self._every = config.evaluation.every
        self._metric = metric
        self._emit = on_report
        self._reported = 0
        self._num_steps = 0

    def begin(self, num_steps: int) -> None:
        self._num_steps = num_steps

    def report_news(self, records: list[dict[str, Any]]) -> None:
        if any(self._is_due(record) for record in records):
            self.report_all()

    def report_all(self) -> None:
        for report in reports(read_metrics(self._directory), self._is_due, metric=self._metric, every=self._every):
            if report.step > self._reported:
                self._reported = report.step
                self._emit(report)

    def _is_due(self, record: dict[str, Any]) -> bool:
        """Each evaluation; of the training loss, where an evaluation would be."""
        if self._metric not in record:
            return False
        return self._metric == "eval_loss" or record["step"] % self._every == 0 or record["step"] == self._num_steps


def progress_of(directory: Path) -> Progress:
    """How far a run has come by its metrics, also past its last evaluation."""
    steps = [record for record in read_metrics(directory) if "loss" in record]
    if not steps:
        return NOTHING_DONE
    return Progress(steps[-1]["step"], sum(s["num_tokens"] for s in steps), sum(s["seconds"] for s in steps))


def reports(
    records: list[dict[str, Any]], is_due: Callable[[dict[str, Any]], bool], *, metric: str, every: int
) -> Iterator[Report]:
    """The training loss is the mean of the last `every` steps: that of one step is mostly noise."""
    steps = [record for record in records if "loss" in record]
    for record in records:
        if is_due(record):
            until = [step for step in steps if step["step"] <= record["step"]]
            value = record[metric] if metric != "loss" else statistics.fmean(s["loss"] for s in until[-every:])
            yield Report(record["step"], value, sum(s["num_tokens"] for s in until), sum(s["seconds"] for s in until))
