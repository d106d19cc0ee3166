"""Training as it goes: a bar on a terminal, a plain line every few seconds elsewhere."""

import sys
import time
from types import TracebackType
from typing import Any

from ftray.tracking.metrics import losses_of_sources
from ftray.train.on_ray.trainer import Watcher

PLAIN_INTERVAL_S = 10.0


class TrainProgress:
    def __init__(self, *, quiet: bool = False):
        self._quiet = quiet
        self._terminal = sys.stdout.isatty() and not quiet
        self._bar: Any = None
        self._task: Any = None
        self._num_steps = 0
        self._latest: dict[str, Any] = {}
        self._step_seconds: list[float] = []
        self._printed_at = 0.0

    def watcher(self) -> Watcher:
        return Watcher(log=self.log, on_metrics=self.on_metrics, on_start=self.on_start)

    def log(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(f"  {text}", highlight=False, markup=False)
        else:
            print(f"  {text}", file=sys.stderr if self._quiet else sys.stdout, flush=True)

    def on_start(self, first_step: int, num_steps: int) -> None:
        self._num_steps = num_steps
        if self._terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            columns = (TextColumn("  step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns)
            self._bar.start()
            self._task = self._bar.add_task("workers start", total=num_steps, completed=first_step)
        else:
            self.log(f"{num_steps} steps, from step {first_step + 1}; workers start")

    def on_metrics(self, records: list[dict[str, Any]]) -> None:
        for record in records:
            if "eval_loss" in record:
                parts = [f"{name} {value:.4f}" for name, value in losses_of_sources(record).items()]
                of_each = f" ({', '.join(parts)})" if parts else ""
                self.log(f"step {record['step']}/{self._num_steps}  evaluation loss {record['eval_loss']:.4f}{of_each}")
            else:
                self._latest = record
                self._step_seconds.append(record["seconds"])
        if not any("loss" in record for record in records):
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=self._latest["step"], description=self.describe())
        elif time.monotonic() - self._printed_at > PLAIN_INTERVAL_S or self._latest["step"] == self._num_steps:
            self._printed_at = time.monotonic()
            self.log(f"step {self._latest['step']}/{self._num_steps}  {self.describe()}")

    def describe(self) -> str:
        record = self._latest
        recent = self._step_seconds[-20:]
        left = (self._num_steps - record["step"]) * sum(recent) / len(recent)
        speed = f"{record['tokens_per_s']:.0f} tokens/s  MFU {record['mfu']:.0%}"
        return f"loss {record['loss']:.4f}  {speed}  {clock(left)} left"

    def __enter__(self) -> "TrainProgress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
