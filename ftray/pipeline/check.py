"""What can be known of a pipeline before its first step: its files, and that each stage can follow the one before."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ftray.config import PipelineConfig, RunConfig, Space, SweepConfig, load_config, load_sweep
from ftray.config.space import load_any
from ftray.data.sources import check_source
from ftray.errors import UserError
from ftray.objectives import objective_of
from ftray.registry import Registry
from ftray.registry.reference import check_alias
from ftray.sweep.prepare import refuse_population_in_store
from ftray.train.hooks.own_callbacks import own_callbacks
from ftray.train.prepare import check_before_anything
from ftray.train.runs.claim import refuse_vanishing_directory
from ftray.train.runs.uri import artifact_name, run_uri

# Of an adapter: what goes on from another one has the same.
SHAPE = ("variant", "rank", "alpha", "rank_pattern", "alpha_pattern", "targets", "modules_to_save")

Sweep = tuple[SweepConfig, Space]


@dataclass(frozen=True)
class CheckedPipeline:
    record_uri: str  # where it keeps what it has done
    measures: bool  # whether there is anything to measure


def check_pipeline(config: PipelineConfig) -> CheckedPipeline:
    """All that can be known before the first step of the first run. Raises `UserError`."""
    stages = [load_stage(config, path) for path in config.train]
    runs = [points_of(stage)[0] for stage in stages]
    names = [run.name for run in runs]
    if len({*names, config.name}) <= len(names):
        raise UserError(
            f"name: the pipeline and its runs need names of their own, not {', '.join([config.name, *names])}"
        )
    for path, stage, earlier in zip(config.train[1:], stages[1:], runs, strict=False):
        check_follows(config, path, stage, earlier)
    points, last = points_of(stages[-1]), runs[-1]
    check_conditions(config, points)
    check_publishing(config, points)
    checked = CheckedPipeline(run_uri(last.runs_dir, config.name), has_loss(last) or config.general_text is not None)
    for stage, run in zip(stages, runs, strict=True):
        if not isinstance(stage, RunConfig):
            refuse_population_in_store(stage[0], run)
        check_before_anything(run)
        refuse_vanishing_directory(run)
        own_callbacks(run)
    if config.general_text is not None:
        check_source("general_text", config.general_text)
    return checked


def check_conditions(config: PipelineConfig, points: list[RunConfig]) -> None:
    """That what they compare can be measured of the last runs. Raises `UserError`."""
    asks = all(objective_of(run.objective).shape == "conversation" and run.data.eval is not None for run in points)
    if not asks and any(".accuracy" in text for text in config.require):
        raise UserError(f"require: accuracy needs questions: {config.train[-1]} has no data.eval with objective sft")
    if not all(map(has_loss, points)) and any(".loss" in text for text in config.require):
        raise UserError(f"require: loss needs data.eval and objective sft or text in {config.train[-1]}")


def check_publishing(config: PipelineConfig, points: list[RunConfig]) -> None:
    """Raises `UserError`."""
    if config.publish is None:
        return
    if any(run.adapter is None for run in points):
        raise UserError(f"publish: {config.train[-1]} trains all weights: there is no adapter to publish")
    if config.publish.alias is not None:
        check_alias(config.publish.alias, f"{config.publish.name}@{config.publish.alias}")
    Registry(points[0].registry)


def check_follows(config: PipelineConfig, path: str, stage: RunConfig | Sweep, earlier: RunConfig) -> None:
    """That a stage can start from what the one before leaves. Raises `UserError`."""
    run = points_of(stage)[0]
    artifact = f"{run_uri(earlier.runs_dir, earlier.name)}/{artifact_name(is_adapter=earlier.adapter is not None)}"
    start = start_from(artifact, is_adapter=earlier.adapter is not None)
    load_stage(config, path, start if isinstance(stage, RunConfig) else None)  # the schema speaks
    if earlier.adapter is None:
        return
    if not isinstance(stage, RunConfig):
        raise UserError(f"train: {path}: a sweep starts from its base and cannot go on from {earlier.name}")
    if run.adapter is None:
        raise UserError(f"train: {path} trains all weights and cannot go on from an adapter ({earlier.name})")
    if run.base_model != earlier.base_model:
        raise UserError(f"train: {path} has base_model {run.base_model}, {earlier.name} {earlier.base_model}")
    for key in SHAPE:
        here, there = getattr(run.adapter, key), getattr(earlier.adapter, key)
        if here != there:
            raise UserError(f"train: {path} has adapter.{key} {here}, {earlier.name} {there}; they must be the same")


def has_loss(run: RunConfig) -> bool:
    return run.data.eval is not None and objective_of(run.objective).unit == "token"


def load_stage(config: PipelineConfig, path: str, more: dict[str, Any] | None = None) -> RunConfig | Sweep:
    """A run or sweep file with the pipeline's overrides. Raises `ConfigError`, `UserError`."""
    settings = config.overrides | (more or {})
    kind, _ = load_any(path)
    if kind == "sweep":
        return load_sweep(path, [f"overrides.{setting}" for setting in leaves(settings)])
    if kind != "run":
        raise UserError(f"train: {path} is a {kind} file; give run or sweep files")
    return load_config(path, list(leaves(settings)), kind="run")


def leaves(settings: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """As `key.path=value`, each leaf of a section by itself."""
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}={json.dumps(value)}"


def points_of(stage: RunConfig | Sweep) -> list[RunConfig]:
    """The run; of a sweep, runs with its data, base and place, one for every kind of point."""
    if isinstance(stage, RunConfig):
        return [stage]
    config, space = stage
    points = space.points_to_check(config.search)
    return [space.config(point, name=config.name) for point in points]


def start_from(uri: str, *, is_adapter: bool) -> dict[str, Any]:
    return {"adapter.init_from" if is_adapter else "base_model": uri}
