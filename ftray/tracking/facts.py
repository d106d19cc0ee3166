"""What a run's report says at its top: how far it is, how long it took, what it learned from, where the result lies."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ftray.config.renamed import with_new_names
from ftray.config.run import RunConfig
from ftray.tracking.status import read_status

Fact = tuple[str, str]  # label, value


def facts_of(
    run_directory: Path, config: dict[str, Any], result: dict[str, Any] | None, metrics: Sequence[dict[str, Any]]
) -> list[Fact]:
    """Those that are known; a run that goes on knows fewer."""
    status = read_status(run_directory)
    steps = [record for record in metrics if "loss" in record]
    evaluations = [record for record in metrics if "eval_loss" in record]
    facts: list[Fact] = [("status", "finished" if result is not None else status.get("state", "unknown"))]
    if notes := config["tracking"].get("notes"):
        facts.append(("notes", notes))
    if tags := config["tracking"].get("tags"):
        facts.append(("tags", ", ".join(tags)))
    if status.get("error"):
        facts.append(("error", status["error"]))
    total = status.get("num_steps") or (result or {}).get("steps")
    if steps:
        facts.append(("steps", f"{steps[-1]['step']:,}" + (f" of {total:,}" if total else "")))
    if status.get("began"):
        facts.append(("started", time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(status["began"]))))
    if (seconds := sum(record.get("seconds", 0.0) for record in steps)) > 0:
        facts.append(("time in steps", clock(seconds)))
    if len(steps) > 1:
        facts.append(
            ("training loss", f"{steps[0]['loss']:.4f} at the first step, {steps[-1]['loss']:.4f} at the last")
        )
    if evaluations:
        best = min(evaluations, key=lambda record: record["eval_loss"])
        facts.append(("best evaluation loss", f"{best['eval_loss']:.4f} at step {best['step']:,}"))
    if result is not None:
        for name, counts in result["data"].items():
            tokens = f"{counts['tokens']:,} tokens, {counts['trained_tokens']:,} of them trained"
            facts.append((f"data.{name}", f"{config['data'][name]}: {counts['examples']:,} examples, {tokens}"))
        facts.append(("data digest", result["data_digest"]))
        facts.append(("result", result["output"]))
        facts.append(("next", next_command(config, result)))
    return facts


def next_command(config: dict[str, Any], result: dict[str, Any]) -> str:
    if config["adapter"] is None:
        return f"ftray serve SERVE.yaml base_model={result['output']}"
    registry = config.get("registry", "registry")
    flag = "" if registry == "registry" else f" --registry {registry}"
    return f"ftray adapters publish {result['output']} --name {config['name']}{flag}"


def changed_settings(config: dict[str, Any]) -> dict[str, Any] | None:
    """What differs from the defaults; None where this ftray does not read the config any more."""
    try:
        return RunConfig.model_validate(with_new_names(config)).model_dump(mode="json", exclude_defaults=True)
    except (ValidationError, ValueError):
        return None


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
