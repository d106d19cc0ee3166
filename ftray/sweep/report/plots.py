"""The plots of a sweep, as SVG."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ftray.config.domains import Choice, Range
from ftray.config.space import short
from ftray.sweep.search.importance import Importance
from ftray.sweep.study import Study
from ftray.sweep.trials import Trial
from ftray.tracking.curves import Curve, figure, svg, tidy

BEST, OTHERS, ENDED = "#2563eb", "#64748b", "#cbd5e1"
COLOURS = "viridis_r"  # dark is good


def curves(study: Study) -> str:
    """The metric of every run by step; the best trial stands out, those that were ended early are pale."""
    drawn, best = [], study.best
    for trial in sorted(study.trials, key=lambda trial: trial is best):  # the last one is drawn over the others
        is_best = trial is best
        colour = BEST if is_best else OTHERS if trial.is_finished or not trial.is_over else ENDED
        note = ", the best" if is_best else "" if trial.is_finished else f", {trial.status}"
        for run in [run for run in trial.runs if run.reports]:
            points = [report.step for report in run.reports], [report.value for report in run.reports]
            drawn.append(Curve(f"{run.name}{note}", *points, colour, 2 if is_best else 1))
    values = [value for curve in drawn for value in curve.values]
    is_wide = bool(values) and min(values) > 0 and max(values) > 20 * min(values)
    return figure(drawn, label=study.config.search.metric.replace("_", " "), is_log=is_wide)


def parallel_coordinates(study: Study) -> str:
    """One line a trial through the values of all keys to its metric."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    trials = [trial for trial in of_the_space(study) if trial.mean is not None and math.isfinite(trial.mean)]
    keys = list(study.space.free)
    drawn = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = drawn.add_subplot()
    means = [trial.mean for trial in trials if trial.mean is not None]
    heights = scaled(means)
    shade = colormaps[COLOURS]
    for trial, height in zip(trials, heights, strict=True):
        line = [position(study.space.free[key], trial.point[key]) for key in keys]
        good = 1 - height if study.config.search.mode == "min" else height
        width = 2.5 if trial is study.best else 1
        axes.plot([*line, height], color=shade(good), linewidth=width, alpha=1 if trial.is_finished else 0.45)
    axes.set_xticks(range(len(keys) + 1), [*keys, study.config.search.metric], fontsize=10)
    for index in range(len(keys) + 1):
        axes.axvline(index, color="#94a3b8", linewidth=0.8, zorder=0)
    paper = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1}
    for index, key in enumerate(keys):
        for at, text in marks(study.space.free[key]):
            axes.text(index + 0.03, at, text, fontsize=9, color="#334155", va="center", bbox=paper)
    if means:
        for at, value in ((0, min(means)), (1, max(means))):
            axes.text(len(keys), at, f" {value:.4g}", fontsize=9, color="#334155", va="center")
    axes.set_yticks([])
    axes.set_xlim(-0.1, len(keys) + 0.35)
    return tidy(drawn, grid=False)


def heat_map(study: Study, keys: tuple[str, str]) -> str:
    """The best mean of every pair of values, of two keys; a range is cut into bins. Of trials that came to their ends,
    or where a cell has none, of others, which it says."""
    from matplotlib.figure import Figure

    down, across = (study.space.free[key] for key in keys)
    rows, columns = cells(down), cells(across)
    grid = np.full((len(rows), len(columns)), np.nan)
    is_final = np.zeros(grid.shape, dtype=bool)
    better = min if study.config.search.mode == "min" else max
    for trial in of_the_space(study):
        if trial.mean is not None and math.isfinite(trial.mean):
            at = cell(down, trial.point[keys[0]], len(rows)), cell(across, trial.point[keys[1]], len(columns))
            if np.isnan(grid[at]) or (trial.is_finished and not is_final[at]):
                grid[at], is_final[at] = trial.mean, trial.is_finished
            elif trial.is_finished == is_final[at]:
                grid[at] = better(grid[at], trial.mean)
    drawn = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = drawn.add_subplot()
    image = axes.imshow(grid, cmap=COLOURS if study.config.search.mode == "max" else "viridis", aspect="auto")
    middle = float(np.nanmean(grid)) if not np.isnan(grid).all() else 0.0
    for (row, column), value in np.ndenumerate(grid):
        if not np.isnan(value):
            colour = "white" if (value < middle) == (study.config.search.mode == "min") else "black"
            text = f"{value:.4g}" if is_final[row, column] else f"{value:.4g}\n(not to the end)"
            axes.text(column, row, text, ha="center", va="center", fontsize=10, color=colour)
    axes.set_yticks(range(len(rows)), rows, fontsize=10)
    axes.set_xticks(range(len(columns)), columns, fontsize=10)
    axes.set_ylabel(keys[0], fontsize=10)
    axes.set_xlabel(keys[1], fontsize=10)
    drawn.colorbar(image, label=study.config.search.metric.replace("_", " "))
    return svg(drawn)


def importances(found: Importance) -> str:
    from matplotlib.figure import Figure

    shares = found.shares
    drawn = Figure(figsize=(6.4, 1.1 + 0.4 * len(shares)), layout="constrained")
    axes = drawn.add_subplot()
    names = list(shares)[::-1]
    axes.barh(names, [shares[name] for name in names], color=BEST)
    axes.set_xlabel(f"share of what the trials differ by ({found.method})", fontsize=10)
    axes.tick_params(labelsize=10)
    return tidy(drawn)


# -- values on an axis ---------------------------------------------------------------------------------------------

BINS = 5  # of a range without points


def position(domain: Choice | Range, value: Any) -> float:
    """From 0 to 1."""
    if isinstance(domain, Choice):
        return domain.values.index(value) / max(1, len(domain.values) - 1)
    if domain.is_log:
        return math.log(value / domain.low) / math.log(domain.high / domain.low)
    return (value - domain.low) / (domain.high - domain.low)


def marks(domain: Choice | Range) -> list[tuple[float, str]]:
    shown = domain.values if isinstance(domain, Choice) else (domain.low, domain.high)
    return [(position(domain, value), short(value)) for value in shown]


def cells(domain: Choice | Range) -> list[str]:
    if isinstance(domain, Choice):
        return [short(value) for value in domain.values]
    if domain.points is not None:
        return [short(value) for value in domain.grid]
    edges = [edge(domain, i / BINS) for i in range(BINS + 1)]
    return [f"{short(low)} to {short(high)}" for low, high in itertools.pairwise(edges)]


def cell(domain: Choice | Range, value: Any, count: int) -> int:
    if isinstance(domain, Choice):
        return domain.values.index(value)
    if domain.points is not None:
        places = [position(domain, point) for point in domain.grid]
        return min(range(count), key=lambda at: abs(places[at] - position(domain, value)))
    return min(count - 1, int(position(domain, value) * count))


def edge(domain: Range, share: float) -> float:
    if domain.is_log:
        return domain.low * (domain.high / domain.low) ** share
    return domain.low + (domain.high - domain.low) * share


def scaled(values: Sequence[float]) -> list[float]:
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    return [(value - low) / (high - low) if high > low else 0.5 for value in values]


def heat_map_keys(study: Study, shares: dict[str, float]) -> tuple[str, str] | None:
    """Rank against rate where both are searched; else the two keys that matter most."""
    keys = sorted(study.space.free, key=lambda key: -shares.get(key, 0.0))
    wanted = ("adapter.rank", "optimizer.learning_rate")
    if set(wanted) <= set(keys):
        return wanted
    return (keys[0], keys[1]) if len(keys) > 1 else None


def of_the_space(study: Study) -> list[Trial]:
    """Without those that the user cloned, whose values may have no place on an axis."""
    return [trial for trial in study.trials if trial.cloned_from is None]


def has_values(trials: Sequence[Trial]) -> bool:
    return any(trial.mean is not None for trial in trials)
