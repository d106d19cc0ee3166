"""report.html: loss curves and, where there is one, a table of answers. One file, no network."""

import html
import io
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2

from ftray.storage import read_json, write_bytes, write_json
from ftray.tracking.events import read_events
from ftray.tracking.facts import changed_settings, facts_of
from ftray.tracking.metrics import read_metrics
from ftray.tracking.runs import RESULT, RunSummary
from ftray.tracking.samples import read_samples

REPORT = "report.html"
ANSWERS = "answers.json"  # kept, so that the report can be drawn again
TEMPLATE = Path(__file__).with_name("report.html")
SHOWN = ("loss", "learning_rate", "grad_norm", "tokens_per_s", "mfu", "memory_gib", "reward_margin", "reward_accuracy")
COMPARED = ("loss", "eval_loss", "tokens_per_s")
LABELS = {
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm before clipping",
    "tokens_per_s": "tokens/s",
    "mfu": "MFU",
    "memory_gib": "peak memory of rank 0, GiB",
    "eval_loss": "evaluation loss",
}
COLOURS = ("#2563eb", "#ea580c")


@dataclass(frozen=True)
class AnswerTable:
    """What a tuned model gained on held-out questions."""

    base_accuracy: float
    tuned_accuracy: float
    served_accuracy: float | None
    adapter: str
    rows: list[dict[str, Any]]  # question, expected, base, tuned


def write_report(run_directory: Path, *, answers: AnswerTable | None = None) -> Path:
    path = run_directory / REPORT
    write_bytes(path, render_report(run_directory, answers=answers).encode())
    return path


def render_report(run_directory: Path, *, answers: AnswerTable | None = None) -> str:
    """A page. Answers that are given once are kept for the next."""
    kept = run_directory / ANSWERS
    if answers is not None:
        write_json(kept, asdict(answers))
    elif kept.is_file():
        answers = AnswerTable(**read_json(kept))
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    metrics = read_metrics(run_directory)
    result_file = run_directory / RESULT
    config = read_json(run_directory / "config.json")
    result = read_json(result_file) if result_file.is_file() else None
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        config=config,
        facts=facts_of(run_directory, config, result, metrics),
        changed=changed_settings(config),
        environment=read_json(run_directory / "environment.json"),
        result=result,
        plots=[draw(metrics, name) for name in SHOWN if any(name in record for record in metrics)],
        events=[described(event) for event in read_events(run_directory)],
        answers=answers,
        samples=tabulate(read_samples(run_directory)),
    )


def tabulate(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for every prompt: the expected answer, and the first and the last that was given."""
    rows: dict[str, dict[str, Any]] = {}
    for sample in samples:
        row = rows.setdefault(sample["prompt"], {**sample, "first": sample["answer"], "first_step": sample["step"]})
        row |= {"last": sample["answer"], "last_step": sample["step"]}
    return list(rows.values())


def described(event: dict[str, Any]) -> dict[str, str]:
    rest = {key: value for key, value in event.items() if key not in ("time", "event")}
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time"]))
    more = "; ".join(f"{key.replace('_', ' ')}: {plain(value)}" for key, value in rest.items())
    return {"when": when, "what": event["event"].replace("_", " "), "more": more}


def plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def write_comparison(path: Path, runs: Sequence[RunSummary]) -> None:
    """The curves of two runs over each other, in one file that needs no network."""
    plots = []
    for name in COMPARED:
        curves = [(run.name, [r for r in run.steps + run.evaluations if name in r]) for run in runs]
        if all(records for _, records in curves):
            plots.append(plot([(title, records, name) for title, records in curves], ylabel=label_of(name)))
    title = " and ".join(run.name for run in runs)
    page = f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title><h1>{html.escape(title)}</h1>"
    write_bytes(path, (page + "".join(plots)).encode())


def draw(metrics: list[dict[str, Any]], name: str) -> str:
    """An SVG of one metric by step; the loss with the evaluation loss beside it."""
    steps = [record for record in metrics if name in record]
    curves = [("training loss" if name == "loss" else name, steps, name)]
    evaluations = [record for record in metrics if "eval_loss" in record] if name == "loss" else []
    if evaluations:
        curves.append(("evaluation loss", evaluations, "eval_loss"))
    return plot(curves, ylabel=label_of(name))


def label_of(name: str) -> str:
    return LABELS.get(name, name.replace("_", " "))


def plot(curves: Sequence[tuple[str, list[dict[str, Any]], str]], *, ylabel: str) -> str:
    """`curves`: (label, records with a step, key)."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(5.2, 2.8), layout="constrained")
    axes = figure.add_subplot()
    for (label, records, key), colour in zip(curves, COLOURS, strict=False):
        marker = "o" if len(records) < 20 else None
        points = [r["step"] for r in records], [r[key] for r in records]
        axes.plot(*points, color=colour, marker=marker, markersize=3, linewidth=1.5, label=label)
    if len(curves) > 1:
        axes.legend(frameon=False)
    axes.set_xlabel("step")
    axes.set_ylabel(ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return svg(figure)


def svg(figure: Any) -> str:
    """A matplotlib figure, to stand in a page."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer)
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]
