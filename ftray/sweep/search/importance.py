"""How much of what the trials differ by each key explains."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ftray.config.space import Choice, Space
from ftray.config.sweep import SearchConfig
from ftray.sweep.search.algorithms import as_optuna_study
from ftray.sweep.trials import Trial

MIN_TRIALS = 20  # with fewer that are no grid, an estimate says nothing
TOGETHER = "keys together"  # what no key explains alone


@dataclass(frozen=True)
class Importance:
    shares: dict[str, float]  # by key, the largest first
    method: str


def importance(trials: Sequence[Trial], space: Space, search: SearchConfig) -> Importance | None:
    """Of a whole grid exactly, by the analysis of variance (its main effects, and the rest as one share). Else, from
    `MIN_TRIALS` on, Optuna's estimate (PED-ANOVA, Watanabe et al. 2023, arXiv 2304.10255). None where the points
    cannot carry it."""
    finished = [trial for trial in trials if trial.is_finished and trial.mean is not None]
    varied = [key for key in space.free if len({repr(trial.point[key]) for trial in finished}) > 1]
    if not varied:
        return None
    grid = as_grid(finished, varied) if all(isinstance(space.free[key], Choice) for key in varied) else None
    if grid is not None and len(varied) > 1:
        return main_effects(grid, varied)
    if len(finished) < MIN_TRIALS:
        return None
    import optuna

    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    study = as_optuna_study(finished, space, search)
    shares = optuna.importance.get_param_importances(study, evaluator=evaluator, params=varied)
    return Importance(dict(shares), "Optuna, PED-ANOVA")


def as_grid(trials: Sequence[Trial], keys: Sequence[str]) -> np.ndarray | None:
    """[values of the first key, of the second, ...]; None unless each combination is there once."""
    levels = [sorted({repr(trial.point[key]) for trial in trials}) for key in keys]
    places = {tuple(repr(trial.point[key]) for key in keys): trial.mean for trial in trials}
    combinations = list(itertools.product(*levels))
    if len(trials) != len(combinations) or set(places) != set(combinations):
        return None
    return np.array([places[each] for each in combinations], float).reshape([len(level) for level in levels])


def main_effects(grid: np.ndarray, keys: Sequence[str]) -> Importance | None:
    """Of each key: the variance of the means over all others, as a share of the variance of all."""
    total = float(grid.var())
    if not np.isfinite(total) or total == 0:
        return None
    axes = range(grid.ndim)
    shares = {
        key: float(grid.mean(axis=tuple(axis for axis in axes if axis != number)).var()) / total
        for number, key in enumerate(keys)
    }
    shares = dict(sorted(shares.items(), key=lambda item: -item[1]))
    shares[TOGETHER] = max(0.0, 1 - sum(shares.values()))
    return Importance(shares, "ANOVA of the grid")
