"""Which trials go on. Values are losses here: lower is better."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ftray.config.sweep import SearchConfig


@dataclass(frozen=True)
class Arrival:
    trial: str
    step: int
    value: float


class Scheduler(Protocol):
    def goes_on(self, arrival: Arrival, *, beside: Sequence[Arrival] = ()) -> bool:
        """A trial's next report, in the order in which they came. `beside`: of other trials at the same moment."""
        ...


class NoScheduler:
    def goes_on(self, arrival: Arrival, *, beside: Sequence[Arrival] = ()) -> bool:
        return True


class Asha:
    """Asynchronous successive halving, with early stopping instead of promotion (Li et al. 2020, arXiv 1810.05934,
    section 3; the rule of Ray Tune's `AsyncHyperBandScheduler` with one bracket).

    Rungs lie at grace, grace x eta, grace x eta^2 ... steps. A trial that arrives at a rung goes on when its value is
    within the best 1 / eta of those that arrived there before it; the first of a rung always does. What arrives in the
    same moment, as the members of a fused group do, is judged together: in turns a bad one that came first would go on.
    """

    def __init__(self, *, grace_steps: int, reduction_factor: int):
        self._grace = grace_steps
        self._eta = reduction_factor
        self._rungs: dict[int, dict[str, float]] = {}

    def goes_on(self, arrival: Arrival, *, beside: Sequence[Arrival] = ()) -> bool:
        rung = self._rung_at(arrival.step)
        if rung is None or arrival.trial in self._rungs.setdefault(rung, {}):
            return True
        arrived = self._rungs[rung]
        others = arrived | {other.trial: other.value for other in beside if self._rung_at(other.step) == rung}
        cutoff = np.quantile(list(others.values()), 1 / self._eta) if others else math.inf
        arrived[arrival.trial] = arrival.value
        return bool(arrival.value <= cutoff)

    def _rung_at(self, step: int) -> int | None:
        """The highest that lies behind."""
        rung = None
        milestone = self._grace
        while milestone <= step:
            rung, milestone = milestone, milestone * self._eta
        return rung


class MedianStopping:
    """A trial whose best value so far is worse than the median of the others' means up to the same step is stopped
    (Golovin et al. 2017, Google Vizier, section 3.2.2). What arrives in the same moment counts for each other: in turns
    the first ones would never have enough others, and would always go on."""

    MIN_TRIALS = 3  # that have come as far

    def __init__(self, *, grace_steps: int):
        self._grace = grace_steps
        self._curves: dict[str, list[tuple[int, float]]] = {}

    def goes_on(self, arrival: Arrival, *, beside: Sequence[Arrival] = ()) -> bool:
        for reported in (arrival, *beside):
            curve = self._curves.setdefault(reported.trial, [])
            if not curve or curve[-1][0] < reported.step:
                curve.append((reported.step, reported.value))
        step, curve = arrival.step, self._curves[arrival.trial]
        others = [c for name, c in self._curves.items() if name != arrival.trial and c[-1][0] >= step]
        if step < self._grace or len(others) < self.MIN_TRIALS:
            return True
        means = [statistics.fmean(v for at, v in other if at <= step) for other in others]
        return min(v for _, v in curve) <= statistics.median(means)


def make_scheduler(search: SearchConfig, *, evaluate_every: int) -> Scheduler:
    grace = search.grace_steps if search.grace_steps is not None else evaluate_every
    if search.scheduler == "asha":
        return Asha(grace_steps=grace, reduction_factor=search.reduction_factor)
    if search.scheduler == "median":
        return MedianStopping(grace_steps=grace)
    return NoScheduler()
