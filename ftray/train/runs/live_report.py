"""report.html while a run goes on: after evaluations, and at its end, whatever end that is."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ftray.errors import InterruptedRunError
from ftray.tracking.metrics import METRICS
from ftray.tracking.report import REPORT, write_report
from ftray.tracking.status import FAILED, INTERRUPTED, QUEUED, write_status

SHARE = 0.02  # of the driver's time goes into drawing, at most
Records = list[dict[str, Any]]

log = logging.getLogger("ftray.train")


@contextlib.contextmanager
def live_report(run_directory: Path) -> Iterator[Callable[[Records], None]]:
    """What the records of metrics.jsonl are given to. The run's status is kept beside it."""
    write_status(run_directory, QUEUED, began=time.time(), error=None)
    report = LiveReport(run_directory)
    try:
        yield report.on_metrics
    except BaseException as error:
        is_stop = isinstance(error, InterruptedRunError | KeyboardInterrupt)
        write_status(run_directory, INTERRUPTED if is_stop else FAILED, error=None if is_stop else str(error))
        report.draw()
        raise


class LiveReport:
    def __init__(self, run_directory: Path):
        self._directory = run_directory
        self._next = 0.0

    def on_metrics(self, records: Records) -> None:
        if any("eval_loss" in record for record in records) and time.monotonic() > self._next:
            began = time.monotonic()
            self.draw()
            self._next = time.monotonic() + (time.monotonic() - began) / SHARE

    def draw(self) -> None:
        """A run does not end for want of a picture, whatever is in the way: a full disk, or a mistake of ours."""
        if (self._directory / METRICS).is_file():
            try:
                write_report(self._directory)
            except Exception as error:  # noqa: BLE001
                log.warning("%s could not be drawn: %s: %s", REPORT, type(error).__name__, error)
