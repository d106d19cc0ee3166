"""When the loss of a step is not a number, or far above the recent ones: the rule of `guard` in the config."""

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ftray.config.run import GuardConfig
from ftray.tracking.metrics import read_metrics

WINDOW_STEPS = 50
MIN_STEPS = 10  # before this many, no step is far above the others
MAX_NAMED_ROWS = 10


class GoBack(Exception):
    """Not an error of the run's: the workers start again from the last checkpoint and pass over the step."""


class LossGuard:
    def __init__(self, config: GuardConfig, *, earlier_losses: Iterable[float] = ()):
        """`earlier_losses`: of the steps before, where a run goes on."""
        self._config = config
        self._recent: deque[float] = deque(earlier_losses, maxlen=WINDOW_STEPS)

    def problem(self, loss: float) -> str | None:
        """What is wrong with this step's loss; a good one is remembered."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        factor = self._config.spike_factor
        if factor is not None and len(self._recent) >= MIN_STEPS:
            usual = statistics.median(self._recent)
            if loss > factor * usual:
                return f"the loss is {loss:.4g}, over guard.spike_factor ({factor:g}) times the recent {usual:.4g}"
        self._recent.append(loss)
        return None


def recent_losses(run_directory: Path, *, until_step: int) -> list[float]:
    """Of the steps before `until_step` that a guard looks at, where a run goes on."""
    losses = [r["loss"] for r in read_metrics(run_directory) if "loss" in r and r["step"] <= until_step]
    return losses[-WINDOW_STEPS:]


def suspects(micro_batches: Sequence[tuple[float, list[int]]]) -> list[int]:
    """Source rows of the micro-batch with the worst mean loss; of all that are not finite, where some are not.

    `micro_batches`: (mean loss, source rows), of all ranks.
    """
    broken = [rows for loss, rows in micro_batches if not math.isfinite(loss)]
    if not broken:
        broken = [max(micro_batches)[1]] if micro_batches else []
    return sorted({row for rows in broken for row in rows})  # ranks that share a row each name it


def name_rows(rows: Sequence[int], name_of: Callable[[int], str] = str) -> str:
    """`name_of`: where there are several sources, with that one's."""
    shown = ", ".join(map(name_of, rows[:MAX_NAMED_ROWS]))
    return shown + (f" and {len(rows) - MAX_NAMED_ROWS} more" if len(rows) > MAX_NAMED_ROWS else "")
