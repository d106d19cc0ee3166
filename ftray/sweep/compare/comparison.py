"""`compare`: the choices of one key, each at its own best point, and how they differ from the first of them."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftray.config.domains import Choice, is_number
from ftray.config.space import short
from ftray.evaluate.scores import Score
from ftray.storage import read_json, write_json
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
    at_edge: tuple[str, ...]  # keys whose best value is the last that was tried: the true best may lie beyond
    scores: tuple[Score, ...]  # of that trial's seeds
    alone: Alone | None

    @property
    def accuracy(self) -> float | None:
        return mean_or_none([score.accuracy for score in self.scores])

    @property
    def general_loss(self) -> float | None:
        return mean_or_none([score.general_loss for score in self.scores])

    @property
    def problems(self) -> list[str]:
        return list(dict.fromkeys(score.problem for score in self.scores if score.problem is not None))

    @property
    def deviation(self) -> float | None:
        """Of the metric over the seeds."""
        values = self.best.values if self.best is not None else []
        return statistics.stdev(values) if len(values) > 1 else None


@dataclass(frozen=True)
class Comparison:
    key: str
    metric: str
    is_lower_better: bool
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
                f"{self._name(method)}: its best {key} is the last that was tried: try more before this is believed"
                for key in method.at_edge
            ]
            lines += [f"{self._name(method)}: not scored: {problem}" for problem in method.problems]
        return lines

    def _verdict(self, method: Method) -> str:
        name, reference = self._name(method), self._name(self.reference)
        if method.best is None or self.reference.best is None:
            missing = name if method.best is None else reference
            return f"{name} and {reference} cannot be compared: no trial with {missing} finished"
        own, other = method.best.mean, self.reference.best.mean
        assert own is not None
        assert other is not None
        difference = own - other
        share = difference / abs(other) if other else 0.0
        text = f"{name}: {self.metric} {own:.4f} against {other:.4f} ({share:+.1%}"
        deviations = [method.deviation for method in (method, self.reference) if method.deviation is not None]
        spread = max(deviations, default=None)
        text += f", {difference / spread:+.1f} standard deviations over seeds)" if spread else ")"
        text += f", {self._relation(difference, share, spread)} {reference}"
        text += "" if spread else " as far as one seed tells"
        if method.rate and self.reference.rate and method.rate != self.reference.rate:
            text += f"; its best {RATE} is {method.rate / self.reference.rate:.3g} times as high"
        return text

    def _relation(self, difference: float, share: float, spread: float | None) -> str:
        if abs(share) <= CLOSE:
            return "as good as"
        if spread is not None and abs(difference) <= DEVIATIONS * spread:
            return "not told apart from"
        return "worse than" if (difference > 0) is self.is_lower_better else "better than"

    def _name(self, method: Method) -> str:
        return f"{self.key} {short(method.value)}"


def mean_or_none(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def choices_of(study: Study) -> tuple[Any, ...]:
    assert study.config.compare is not None
    domain = study.space.domains[study.config.compare.key]
    assert isinstance(domain, Choice)
    return domain.values


def trials_of(study: Study, value: Any) -> list[Trial]:
    """With this choice, the best first. A clone that changes a key beside the space's is another way altogether."""
    assert study.config.compare is not None
    key = study.config.compare.key
    return [t for t in study.ranked if t.point.keys() <= study.space.domains.keys() and t.point[key] == value]


def best_trial(study: Study, value: Any) -> Trial | None:
    return next((trial for trial in trials_of(study, value) if trial.is_finished), None)


def read_comparison(study: Study, directory: Path) -> Comparison | None:
    """As far as it was measured; None: nothing is compared."""
    compare = study.config.compare
    if compare is None:
        return None
    measured = read_measured(directory)
    methods = tuple(method_of(study, value, measured) for value in choices_of(study))
    base = measured["scores"].get(BASE)
    return Comparison(
        compare.key,
        study.config.search.metric,
        study.config.search.mode == "min",
        methods,
        Score(**base) if base is not None else None,
    )


def method_of(study: Study, value: Any, measured: dict[str, dict[str, Any]]) -> Method:
    best = best_trial(study, value)
    if best is None:
        return Method(value, None, rate=None, at_edge=(), scores=(), alone=None)
    scores = [measured["scores"].get(run.name) for run in best.runs]
    alone = measured["alone"].get(best.name)
    return Method(
        value,
        best,
        rate=study.space.config(best.point).optimizer.learning_rate,
        at_edge=tuple(edges(study, best, trials_of(study, value))),
        scores=tuple(Score(**score) for score in scores if score is not None),
        alone=Alone(**alone) if alone is not None else None,
    )


def compared_trials(study: Study) -> list[Trial]:
    """The best of each choice of which one has finished."""
    found = (best_trial(study, value) for value in choices_of(study))
    return [trial for trial in found if trial is not None]


def is_measured(study: Study, directory: Path) -> bool:
    measured, trials = read_measured(directory), compared_trials(study)
    scored = all(run.name in measured["scores"] for trial in trials for run in trial.runs)
    return scored and all(trial.name in measured["alone"] for trial in trials)


def edges(study: Study, best: Trial, trials: Sequence[Trial]) -> list[str]:
    """Keys of which the best has the lowest or the highest number that its way was tried with, of three at least."""
    found = []
    for key in study.space.free:
        values = {trial.point[key] for trial in trials if trial.is_over and is_number(trial.point[key])}
        if len(values) > 2 and best.point[key] in (min(values), max(values)):
            found.append(key)
    return found


def read_measured(directory: Path) -> dict[str, dict[str, Any]]:
    path = directory / COMPARISON
    return read_json(path) if path.is_file() else {"scores": {}, "alone": {}}


def note_measured(directory: Path, kind: str, found: dict[str, Any]) -> None:
    """Each measurement stands once it was made: a sweep that was cut off does not make it again."""
    measured = read_measured(directory)
    measured[kind] |= {name: vars(value) for name, value in found.items()}
    write_json(directory / COMPARISON, measured)
