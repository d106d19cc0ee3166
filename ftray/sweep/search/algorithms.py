"""The next point. A function of the trials before it, so that a sweep that was cut off goes on as it would have."""

import random
from collections.abc import Sequence
from typing import Any, Protocol

from ftray.config import Space
from ftray.config.domains import Choice, Range
from ftray.config.sweep import SearchConfig
from ftray.sweep.trials import Trial

STARTUP_TRIALS = 5  # by chance, before TPE has something to learn from


class Search(Protocol):
    def point(self, number: int, earlier: Sequence[Trial]) -> dict[str, Any] | None:
        """Of trial `number`; None when there is none left."""
        ...


class GridSearch:
    def __init__(self, space: Space, *, trials: int | None):
        self._points = list(space.grid(trials))

    def point(self, number: int, earlier: Sequence[Trial]) -> dict[str, Any] | None:
        return self._points[number] if number < len(self._points) else None


class RandomSearch:
    def __init__(self, space: Space, *, seed: int):
        self._space = space
        self._seed = seed

    def point(self, number: int, earlier: Sequence[Trial]) -> dict[str, Any] | None:
        return self._space.sample(random.Random(f"{self._seed}/{number}"))


class TpeSearch:
    """Optuna's tree-structured Parzen estimator (Bergstra et al. 2011; Watanabe 2023, arXiv 2304.11127). Trials that
    run meanwhile count as bad ones ("constant liar"), so that several at a time do not try the same."""

    def __init__(self, space: Space, search: SearchConfig):
        self._space = space
        self._search = search

    def point(self, number: int, earlier: Sequence[Trial]) -> dict[str, Any] | None:
        import optuna

        seed = self._search.seed * 1_000_003 + number
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP_TRIALS, constant_liar=True)
        study = as_optuna_study(earlier, self._space, self._search, sampler=sampler)
        trial = study.ask(distributions(self._space))
        return {key: value_of(domain, trial.params[key]) for key, domain in self._space.free.items()}


def make_search(space: Space, search: SearchConfig) -> Search:
    if search.algorithm == "grid":
        return GridSearch(space, trials=search.trials)
    if search.algorithm == "random":
        return RandomSearch(space, seed=search.seed)
    return TpeSearch(space, search)


# -- in Optuna's terms ---------------------------------------------------------------------------------------------


def as_optuna_study(trials: Sequence[Trial], space: Space, search: SearchConfig, *, sampler: Any = None) -> Any:
    import optuna
    from optuna.trial import TrialState

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    direction = "minimize" if search.mode == "min" else "maximize"
    study = optuna.create_study(direction=direction, sampler=sampler)
    for trial in trials:
        if trial.is_finished:
            state = TrialState.COMPLETE
        elif not trial.is_over:
            state = TrialState.RUNNING
        else:
            # Without a value the sampler takes it for the worst; of a failed one it learns nothing.
            state = TrialState.FAIL if trial.status == "failed" else TrialState.PRUNED
        study.add_trial(
            optuna.trial.create_trial(
                state=state,
                params={key: parameter_of(domain, trial.point[key]) for key, domain in space.free.items()},
                distributions=distributions(space),
                value=trial.mean if state == TrialState.COMPLETE else None,
                intermediate_values=reached(trial),
            )
        )
    return study


def reached(trial: Trial) -> dict[int, float]:
    """By a trial that was stopped, at its last step."""
    mean = trial.mean if trial.is_over and trial.status == "stopped" else None
    return {} if mean is None else {trial.step: mean}


def distributions(space: Space) -> dict[str, Any]:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    def distribution(domain: Choice | Range) -> Any:
        if isinstance(domain, Choice):  # by index: a choice may be a list or a section
            return CategoricalDistribution(range(len(domain.values)))
        if domain.is_int:
            return IntDistribution(int(domain.low), int(domain.high), log=domain.is_log)
        return FloatDistribution(domain.low, domain.high, log=domain.is_log)

    return {key: distribution(domain) for key, domain in space.free.items()}


def value_of(domain: Choice | Range, parameter: Any) -> Any:
    return domain.values[parameter] if isinstance(domain, Choice) else parameter


def parameter_of(domain: Choice | Range, value: Any) -> Any:
    return domain.values.index(value) if isinstance(domain, Choice) else value
