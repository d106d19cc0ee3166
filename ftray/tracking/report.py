"""report.html: loss curves and, where there is one, a table of answers. One file, no network."""

import html
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2

from ftray.storage import read_json, write_bytes, write_json
from ftray.tracking.curves import COLOURS, assets, curve_of, figure, style
from ftray.tracking.events import read_events
from ftray.tracking.facts import changed_settings, facts_of
from ftray.tracking.metrics import OF_SOURCE, losses_of_sources, read_metrics
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
    samples = tabulate(read_samples(run_directory))
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
        plots=[draw(metrics, name) for name in SHOWN if any(name in r for r in metrics)] + draw_sources(metrics),
        events=[described(event) for event in read_events(run_directory)],
        answers=answers,
        samples=samples,
        shared_head=shared_head([sample["prompt"] for sample in samples]),
        style=style(),
        assets=assets(),
    )


def tabulate(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for every prompt: the expected answer, and the first and the last that was given."""
    rows: dict[str, dict[str, Any]] = {}
    for sample in samples:
        row = rows.setdefault(sample["prompt"], {**sample, "first": sample["answer"], "first_step": sample["step"]})
        row |= {"last": sample["answer"], "last_step": sample["step"]}
    return list(rows.values())


def shared_head(prompts: Sequence[str]) -> str:
    """The lines that all of several prompts begin with, such as the system message."""
    if len(prompts) < 2:
        return ""
    lines = zip(*(prompt.split("\n")[:-1] for prompt in prompts), strict=False)
    return "\n".join(line for line, *_ in itertools.takewhile(lambda same: len(set(same)) == 1, lines))


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
            pairs = zip(curves, COLOURS, strict=False)
            drawn = [curve_of(title, records, name, colour=colour) for (title, records), colour in pairs]
            plots.append(figure(drawn, label=label_of(name)))
    title = html.escape(" and ".join(run.name for run in runs))
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title>{style()}"
    write_bytes(path, f"{head}<h1>{title}</h1><div class=plots>{''.join(plots)}</div>{assets()}".encode())


def draw(metrics: list[dict[str, Any]], name: str) -> str:
    """One metric by step, with what the evaluations found of it over it."""
    label = label_of(name)
    curves = [curve_of("training loss" if name == "loss" else label, [r for r in metrics if name in r], name)]
    if evaluations := [record for record in metrics if f"eval_{name}" in record]:
        curves.append(curve_of(f"evaluation {label}", evaluations, f"eval_{name}", colour=COLOURS[1]))
    return figure(curves, label=label)


def draw_sources(metrics: list[dict[str, Any]]) -> list[str]:
    """The evaluation loss of each source, where there are several."""
    evaluations = [record for record in metrics if losses_of_sources(record)]
    if not evaluations:
        return []
    curves = [
        curve_of(name, evaluations, f"{OF_SOURCE}{name}", colour=COLOURS[number % len(COLOURS)])
        for number, name in enumerate(losses_of_sources(evaluations[-1]))
    ]
    return [figure(curves, label="evaluation loss of each source")]


def label_of(name: str) -> str:
    return LABELS.get(name, name.replace("_", " "))
