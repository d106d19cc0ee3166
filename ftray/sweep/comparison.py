"""`compare`: the choices of one key, each at its own best point, and how they differ from the first of them."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftray.config.domains import Choice, Range
from ftray.config.space import short
from ftray.storage import read_json, write_json
from ftray.sweep.scores import Score
from ftray.sweep.study import Study
from ftray.sweep.trials import Trial

COMPARISON = "comparison.json"
BASE = "base"  # the untuned model, among the scores
RATE = "optimizer.learning_rate"
CLOSE = 0.01  # as good as: within this share of the metric
DEVIATIONS = 2.0  # over seeds: fewer between two methods do not tell them apart


@dataclass(frozen=True)
class Alone:
    """A short run of the method by itself, one after the other: what it costs."""

    tokens_per_s: float
    memory_gib: float  # of the first worker, at its peak


@dataclass(frozen=True)
class Method:
    """A choice of the compared key."""

    value: Any
    best: Trial | None  # the best of its trials that finished
    rate: float | None  # learning rate of that one
    at_edge: tuple[str, ...]  # keys whose best value is an end of their range: the true best may lie beyond
    scores: tuple[Score, ...]  # of that trial's seeds
    alone: Alone | None

    @property
    def accuracy(self) -> float | None:
        return mean_or_none([score.accuracy for score in self.scores])

    @property
    def general_loss(self) -> float | None:
        return mean_or_none([score.general_loss for score in self.scores])

    @property
    def deviation(self) -> float | None:
        """Of the metric over the seeds."""
        values = self.best.values if self.best is not None else []
        return statistics.stdev(values) if len(values) > 1 else None


@dataclass(frozen=True)
class Comparison:
    key: str
    metric: str
    methods: tuple[Method, ...]
    base: Score | None

    @property
    def reference(self) -> Method:
        return self.methods[0]

    def verdicts(self) -> list[str]:
        """A sentence for each of the others, and what is to be doubted."""
        lines = [self._verdict(method) for method in self.methods[1:]]
        for method in self.methods:
            lines += [
                f"{self._name(method)}: its best {key} is the end of the range: widen it before this is believed"
                for key in method.at_edge
            ]
        return lines

    def _verdict(self, method: Method) -> str:
        name, reference = self._name(method), self._name(self.reference)
        if method.best is None or self.reference.best is None:
            missing = name if method.best is None else reference
            return f"{name} and {reference} cannot be compared: no trial with {missing} finished"
        own, other = method.best.mean, self.reference.best.mean
        assert own is not None
        assert other is not None
        worse = own - other
        share = worse / abs(other) if other else 0.0
        text = f"{name}: {self.metric} {own:.4f} against {other:.4f} ({share:+.1%}"
        deviations = [method.deviation for method in (method, self.reference) if method.deviation is not None]
        spread = max(deviations, default=None)
        text += f", {worse / spread:+.1f} standard deviations over seeds)" if spread else ")"
        text += f", {self._relation(worse, share, spread)} {reference}"
        text += "" if spread else " as far as one seed tells"
        if method.rate and self.reference.rate and method.rate != self.reference.rate:
            text += f"; its best {RATE} is {method.rate / self.reference.rate:.3g} times as high"
        return text

    @staticmethod
    def _relation(worse: float, share: float, spread: float | None) -> str:
        if abs(share) <= CLOSE:
            return "as good as"
        if spread is not None and abs(worse) <= DEVIATIONS * spread:
            return "not told apart from"
        return "worse than" if worse > 0 else "better than"

    def _name(self, method: Method) -> str:
        return f"{self.key} {short(method.value)}"


def mean_or_none(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def best_trials(study: Study) -> list[tuple[Any, Trial | None]]:
    """Of each choice of the compared key."""
    compare = study.config.compare
    assert compare is not None
    domain = study.space.domains[compare.key]
    assert isinstance(domain, Choice)
    found = []
    for value in domain.values:
        own = [trial for trial in study.ranked if trial.is_finished and trial.point[compare.key] == value]
        found.append((value, own[0] if own else None))
    return found


def read_comparison(study: Study, directory: Path) -> Comparison | None:
    """As far as it was measured; None: nothing is compared."""
    compare = study.config.compare
    if compare is None:
        return None
    measured = read_measured(directory)
    methods = tuple(method_of(study, value, best, measured) for value, best in best_trials(study))
    base = measured["scores"].get(BASE)
    metric = study.config.search.metric
    return Comparison(compare.key, metric, methods, Score(**base) if base is not None else None)


def method_of(study: Study, value: Any, best: Trial | None, measured: dict[str, dict[str, Any]]) -> Method:
    if best is None:
        return Method(value, None, rate=None, at_edge=(), scores=(), alone=None)
    scores = [measured["scores"].get(run.name) for run in best.runs]
    alone = measured["alone"].get(best.name)
    return Method(
        value,
        best,
        rate=study.space.config(best.point).optimizer.learning_rate,
        at_edge=tuple(edges(study, best)),
        scores=tuple(Score(**score) for score in scores if score is not None),
        alone=Alone(**alone) if alone is not None else None,
    )


def compared_trials(study: Study) -> list[Trial]:
    """The best of each choice of which one has finished."""
    return [trial for _, trial in best_trials(study) if trial is not None]


def is_measured(study: Study, directory: Path) -> bool:
    measured, trials = read_measured(directory), compared_trials(study)
    scored = all(run.name in measured["scores"] for trial in trials for run in trial.runs)
    return scored and all(trial.name in measured["alone"] for trial in trials)


def edges(study: Study, trial: Trial) -> list[str]:
    """Ranges at whose end it lies, where the range was searched at more than its ends."""
    ranges = {
        key: domain
        for key, domain in study.space.free.items()
        if isinstance(domain, Range) and (domain.points is None or domain.points > 2)
    }
    return [key for key, domain in ranges.items() if trial.point[key] in domain.extremes]


def read_measured(directory: Path) -> dict[str, dict[str, Any]]:
    path = directory / COMPARISON
    return read_json(path) if path.is_file() else {"scores": {}, "alone": {}}


def note_measured(directory: Path, kind: str, found: dict[str, Any]) -> None:
    """Each measurement stands once it was made: a sweep that was cut off does not make it again."""
    measured = read_measured(directory)
    measured[kind] |= {name: vars(value) for name, value in found.items()}
    write_json(directory / COMPARISON, measured)
