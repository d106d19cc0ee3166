"""Curves over the steps of training, in pages that need no network: a picture, which a script makes answer to the
pointer (uPlot draws it then). Without scripts the picture stays."""

import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("page")
MAX_POINTS = 2000  # of a curve in a page; of more, the lowest and the highest of each span are drawn
COLOURS = ("#2563eb", "#ea580c", "#16a34a", "#9333ea", "#0891b2", "#ca8a04", "#db2777", "#64748b")


@dataclass(frozen=True)
class Curve:
    label: str
    steps: Sequence[int]
    values: Sequence[float]
    colour: str = COLOURS[0]
    width: float = 1.5


def curve_of(label: str, records: Sequence[dict[str, Any]], key: str, *, colour: str = COLOURS[0]) -> Curve:
    """Of records that have a step and this key."""
    return Curve(label, [record["step"] for record in records], [record[key] for record in records], colour)


def figure(curves: Sequence[Curve], *, label: str, is_log: bool = False) -> str:
    """HTML of one plot; the page must have `assets` after the last one. `label`: of the values."""
    thinned = [thin(curve) for curve in curves]
    data = {"label": label, "log": is_log, "curves": [described(curve) for curve in thinned]}
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    picture = draw(thinned, label=label, is_log=is_log)
    return f'<figure class="curves"><script type="application/json">{text}</script>{picture}</figure>'


def style() -> str:
    """For a page's head."""
    files = [(PAGE / name).read_text(encoding="utf-8") for name in ("uPlot.min.css", "curves.css")]
    return f"<style>\n{''.join(files)}</style>"


def assets() -> str:
    """After the last figure."""
    files = [(PAGE / name).read_text(encoding="utf-8") for name in ("uPlot.iife.min.js", "curves.js")]
    return "".join(f"<script>\n{text}</script>\n" for text in files)


def described(curve: Curve) -> dict[str, Any]:
    """NaN and infinity, which JSON does not have, are gaps."""
    values = [float(f"{value:.6g}") if math.isfinite(value) else None for value in curve.values]
    look = {"colour": curve.colour, "width": curve.width}
    return {"label": curve.label, "steps": list(curve.steps), "values": values, **look}


def thin(curve: Curve) -> Curve:
    """Its lowest and highest point of each span, so that no spike is lost; the last one too."""
    if len(curve.steps) <= MAX_POINTS:
        return curve
    points = list(zip(curve.steps, curve.values, strict=True))
    length = math.ceil(len(points) / (MAX_POINTS // 2))
    kept: set[int] = {0, len(points) - 1}
    for start in range(0, len(points), length):
        span = range(start, min(start + length, len(points)))
        kept |= {min(span, key=lambda at: points[at][1]), max(span, key=lambda at: points[at][1])}
    chosen = [points[at] for at in sorted(kept)]
    return Curve(curve.label, [step for step, _ in chosen], [v for _, v in chosen], curve.colour, curve.width)


def draw(curves: Sequence[Curve], *, label: str, is_log: bool = False) -> str:
    """An SVG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    drawn = Figure(figsize=(5.2, 2.8), layout="constrained")
    axes = drawn.add_subplot()
    for curve in curves:
        marker = "o" if len(curve.steps) < 20 else None
        look = {"color": curve.colour, "linewidth": curve.width, "marker": marker, "markersize": 3}
        axes.plot(curve.steps, curve.values, label=curve.label, **look)
    if 1 < len(curves) <= len(COLOURS):
        axes.legend(frameon=False, fontsize=9)
    if is_log:
        axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return tidy(drawn)


def tidy(figure: Any, *, grid: bool = True) -> str:
    """The SVG of a figure whose axes are open to the top and right."""
    for axes in figure.axes:
        if grid:
            axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return svg(figure)


def svg(figure: Any) -> str:
    """A matplotlib figure, to stand in a page."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer)
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]
