"""report.html: loss curves and, where there is one, a table of answers. One file, no network."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from ftray.storage import read_json, write_bytes
from ftray.tracking.metrics import read_metrics

TEMPLATE = Path(__file__).with_name("report.html")
SHOWN = ("loss", "learning_rate", "grad_norm", "tokens_per_s")


@dataclass(frozen=True)
class AnswerTable:
    """What a tuned model gained on held-out questions."""

    base_accuracy: float
    tuned_accuracy: float
    served_accuracy: float | None
    adapter: str
    rows: list[dict[str, Any]]  # question, expected, base, tuned


def write_report(run_directory: Path, *, answers: AnswerTable | None = None) -> Path:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    metrics = read_metrics(run_directory)
    result_file = run_directory / "result.json"
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        config=read_json(run_directory / "config.json"),
        environment=read_json(run_directory / "environment.json"),
        result=read_json(result_file) if result_file.is_file() else None,
        plots=[draw(metrics, name) for name in SHOWN if any(name in record for record in metrics)],
        answers=answers,
    )
    path = run_directory / "report.html"
    write_bytes(path, page.encode())
    return path


def draw(metrics: list[dict[str, Any]], name: str) -> str:
    """An SVG of one metric by step; the loss with the evaluation loss beside it."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 2.8), layout="constrained")
    axes = figure.add_subplot()
    steps = [record for record in metrics if name in record]
    label = "training loss" if name == "loss" else name
    axes.plot([r["step"] for r in steps], [r[name] for r in steps], color="#2563eb", linewidth=1.5, label=label)
    evaluations = [record for record in metrics if "eval_loss" in record] if name == "loss" else []
    if evaluations:
        points = [r["step"] for r in evaluations], [r["eval_loss"] for r in evaluations]
        axes.plot(*points, color="#ea580c", marker="o", linewidth=1.5, label="evaluation loss")
        axes.legend(frameon=False)
    axes.set_xlabel("step")
    axes.set_ylabel("loss per trained token" if name == "loss" else name.replace("_", " "))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer)
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]
