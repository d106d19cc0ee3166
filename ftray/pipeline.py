"""`ftray pipeline`: runs in order, each from the result of the one before, then measured, judged and published. A stage
that was done stands: the same command goes on with the next."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray

from ftray.config import PipelineConfig, RunConfig, Space, SweepConfig, load_config, load_sweep
from ftray.config.expression import Expression
from ftray.config.space import load_any
from ftray.errors import FtrayError, UserError
from ftray.model.adapter import adapter_at_hand
from ftray.model.base import prepare_base
from ftray.publish import publish_if_new
from ftray.registry import AdapterVersion, Registry
from ftray.serve.replica import check_base
from ftray.storage import ObjectStore, verify_directory
from ftray.storage.manifest import MANIFEST, sha256_of
from ftray.sweep.comparison import BASE
from ftray.sweep.launch import ray_session, run_sweep, sweep_directory
from ftray.sweep.measure import absolute, with_absolute_data
from ftray.sweep.scores import Score, ScoreJob, score_products
from ftray.sweep.trials import trials_directory
from ftray.train.launch import check_before_anything, launch
from ftray.train.ray_trainer import Watcher, name_for_workers, passed_secrets, worker_environment

RECORD = "pipeline.json"  # in the pipeline's directory
TUNED = "tuned"

Sweep = tuple[SweepConfig, Space]


@dataclass(frozen=True)
class Product:
    """What a stage of training left."""

    run: RunConfig
    place: str  # path or URL of the adapter's or model's directory
    lineage: dict[str, Any]

    @property
    def is_adapter(self) -> bool:
        return self.run.adapter is not None


@dataclass(frozen=True)
class Condition:
    text: str
    values: dict[str, float]
    holds: bool

    def __str__(self) -> str:
        values = ", ".join(f"{key} = {value:.4f}" for key, value in self.values.items())
        return f"{self.text}: {'holds' if self.holds else 'does not hold'} ({values})"


@dataclass(frozen=True)
class Outcome:
    product: Product
    scores: dict[str, Score]  # of `base` and `tuned`; none: nothing was to be measured
    conditions: list[Condition]
    version: AdapterVersion | None


def run_pipeline(config: PipelineConfig, watcher: Watcher, announce: Callable[[str], None]) -> Outcome:
    """Raises `FtrayError` where a condition does not hold: then nothing is published."""
    last = check_pipeline(config)
    store = ObjectStore(f"{last.runs_dir}/{config.name}")
    product: Product | None = None
    for number, path in enumerate(config.train, start=1):
        announce(f"{number} of {len(config.train)}: {path}")
        product = train_stage(config, path, watcher, after=product)
    assert product is not None
    scores: dict[str, Score] = {}
    if measures(config, last):
        announce("measuring the base and what was made of it")
        scores = measured_once(config, product, store, say=watcher.say)
    conditions = [judge(text, scores) for text in config.require]
    for condition in conditions:
        watcher.say(str(condition))
    version = None
    if all(condition.holds for condition in conditions) and config.publish is not None:
        version = publish_stage(config, product, scores)
    record = {
        "pipeline": config.model_dump(mode="json"),
        "product": product.place,
        "conditions": [asdict(condition) for condition in conditions],
        "version": str(version) if version is not None else None,
    }
    keep(store, **record)
    if failed := [condition for condition in conditions if not condition.holds]:
        raise FtrayError(f"{config.name}: nothing was published: {failed[0]}; {product.place} stands")
    return Outcome(product, scores, conditions, version)


def check_pipeline(config: PipelineConfig) -> RunConfig:
    """All that can be known before the first step of the first run; returns the last run. Raises `UserError`."""
    stages = [load_stage(config, path) for path in config.train]
    runs = [example_of(stage) for stage in stages]
    names = [run.name for run in runs]
    if len({*names, config.name}) <= len(names):
        raise UserError(
            f"name: the pipeline and its runs need names of their own, not {', '.join([config.name, *names])}"
        )
    for path, stage, run, earlier in zip(config.train, stages, runs, [None, *runs[:-1]], strict=True):
        check_before_anything(run)
        if earlier is not None and earlier.adapter is not None:
            if not isinstance(stage, RunConfig):
                raise UserError(f"train: {path}: a sweep starts from its base and cannot go on from {earlier.name}")
            if run.adapter is None:
                raise UserError(f"train: {path} trains all weights and cannot go on from an adapter ({earlier.name})")
            if run.base_model != earlier.base_model:
                raise UserError(f"train: {path} has base_model {run.base_model}, {earlier.name} {earlier.base_model}")
    last = runs[-1]
    asks = last.objective.type == "sft" and last.data.eval is not None
    if not asks and any(".accuracy" in text for text in config.require):
        raise UserError(f"require: accuracy needs questions: {config.train[-1]} has no data.eval with objective sft")
    if not has_loss(last) and any(".loss" in text for text in config.require):
        raise UserError(f"require: loss needs data.eval and objective sft or domain in {config.train[-1]}")
    if config.publish is not None and last.adapter is None:
        raise UserError(f"publish: {config.train[-1]} trains all weights: there is no adapter to publish")
    return last


def has_loss(run: RunConfig) -> bool:
    return run.data.eval is not None and run.objective.type in ("sft", "domain")


def measures(config: PipelineConfig, last: RunConfig) -> bool:
    return has_loss(last) or config.general_text is not None


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


def example_of(stage: RunConfig | Sweep) -> RunConfig:
    """Of a sweep: a run with its data, base and place."""
    if isinstance(stage, RunConfig):
        return stage
    config, space = stage
    return space.config(next(iter(space.points_to_check(is_grid=config.search.algorithm == "grid"))), name=config.name)


def train_stage(config: PipelineConfig, path: str, watcher: Watcher, *, after: Product | None) -> Product:
    start = {} if after is None else {"adapter.init_from" if after.is_adapter else "base_model": after.place}
    stage = load_stage(config, path, start)
    if isinstance(stage, RunConfig):
        run, init_from = resolve_start(stage)
        result = launch(run, watcher, init_from=init_from)
        return Product(run, result["output"], {"run": run.name})
    sweep, space = stage
    study = run_sweep(sweep, space, say=watcher.say)
    best = study.best_run
    if best is None:
        raise FtrayError(f"{sweep.name}: no trial finished")
    run, directory = study.config_of(best), trials_directory(sweep_directory(sweep, space)) / best.name
    lineage = {"sweep": sweep.name, "trial": best.name, "point": study.point_of(best)}
    return Product(run, str(directory / ("adapter" if run.adapter is not None else "model")), lineage)


def resolve_start(run: RunConfig) -> tuple[RunConfig, Path | str | None]:
    """`adapter.init_from` as the exact version it is now, so that a resumed run starts from the same, and its files."""
    reference = run.adapter.init_from if run.adapter is not None else None
    if run.adapter is None or reference is None:
        return run, None
    base = prepare_base(run.base_model, say=print)
    if (directory := adapter_at_hand(reference)) is not None:
        if (directory / MANIFEST).is_file():  # a foreign PEFT directory has none
            check_base(reference, verify_directory(directory).metadata, base, here="this run's base is")
        return run, reference if "://" in reference else directory.absolute()
    registry = Registry(run.registry)
    version = registry.get(reference)
    check_base(str(version), version.metadata, base, here="this run's base is")
    adapter = run.adapter.model_copy(update={"init_from": str(version)})
    registry.directory(version)  # whole
    return run.model_copy(update={"adapter": adapter}), registry.place(version)


def measured_once(
    config: PipelineConfig, product: Product, store: ObjectStore, *, say: Callable[[str], None]
) -> dict[str, Score]:
    """From the pipeline's record, where that is of the same weights and data."""
    digest = digest_of(config, product)
    recorded = read_record(store)
    if recorded.get("measured") != digest:
        found = {name: asdict(score) for name, score in measure(config, product)}
        if problems := [score["problem"] for score in found.values() if score["problem"]]:
            raise FtrayError(f"{product.place}: cannot be measured: {problems[0]}")
        recorded = keep(store, measured=digest, scores=found)
    scores = {name: Score(**score) for name, score in recorded["scores"].items()}
    for name, score in scores.items():
        say(describe_score(name, score))
    return scores


def measure(config: PipelineConfig, product: Product) -> Iterator[tuple[str, Score]]:
    """In a Ray task with the resources of one of the run's workers, as it was trained."""
    run = with_absolute_data(product.run)
    first = example_of(load_stage(config, config.train[0]))
    base = prepare_base(first.base_model)
    general = absolute(config.general_text) if config.general_text is not None else None
    named: dict[str, Path | str | None] = {BASE: None}
    base_name = name_for_workers(first, base)
    jobs = [ScoreJob(base_name, named, run, general, held_out=has_loss(run))]
    if product.is_adapter and product.run.base_model == first.base_model:
        named[TUNED] = product.place
    else:
        tuned: dict[str, Path | str | None] = {TUNED: product.place if product.is_adapter else None}
        model = product.run.base_model if product.is_adapter else product.place
        jobs.append(ScoreJob(model, tuned, run, general, held_out=has_loss(run)))
    with ray_session(run):
        for job in jobs:
            environment = {"env_vars": worker_environment(run.workers.gpus_each)}
            task = ray.remote(score_products).options(**job.needs, runtime_env=environment)
            yield from ray.get(task.remote(job, passed_secrets())).items()


def digest_of(config: PipelineConfig, product: Product) -> str:
    """Of the weights and of what they are measured on."""
    directory = adapter_at_hand(product.place) if product.is_adapter else Path(product.place)
    files = verify_directory(directory).files if directory is not None and directory.is_dir() else product.place
    sources = [product.run.data.eval, config.general_text]
    contents = [sha256_of(Path(s)) if s is not None and Path(s).is_file() else s for s in sources]
    return hashlib.sha256(repr([product.run.base_model, files, contents]).encode()).hexdigest()


def describe_score(name: str, score: Score) -> str:
    parts = {
        "exact match": None if score.accuracy is None else f"{score.accuracy:.1%}",
        "loss": None if score.loss is None else f"{score.loss:.4f}",
        "loss on general text": None if score.general_loss is None else f"{score.general_loss:.4f}",
    }
    return f"{name}: " + ", ".join(f"{title} {value}" for title, value in parts.items() if value is not None)


def judge(text: str, scores: dict[str, Score]) -> Condition:
    def value_of(key: str) -> float:
        model, measure = key.split(".")
        value = getattr(scores[model], measure)
        assert value is not None, "the pipeline was checked before it began"
        return value

    condition = Expression(text)
    return Condition(text, {key: value_of(key) for key in condition.keys}, bool(condition.evaluate(value_of)))


def publish_stage(config: PipelineConfig, product: Product, scores: dict[str, Score]) -> AdapterVersion:
    """The same weights are published once, whoever asks again; the alias moves where it does not point there yet."""
    assert config.publish is not None
    directory = adapter_at_hand(product.place)
    if directory is None:
        raise FtrayError(f"{product.place}: is gone")
    registry = Registry(product.run.registry)
    measured = {name: {k: v for k, v in asdict(score).items() if v is not None} for name, score in scores.items()}
    lineage = product.lineage | {"pipeline": config.name, "measured": measured}
    name, alias = config.publish.name, config.publish.alias
    version = publish_if_new(registry, name, directory, lineage=lineage)
    if alias is not None and registry.aliases(name).get(alias) != version.number:
        registry.promote(str(version), alias)
    return version


def read_record(store: ObjectStore) -> dict[str, Any]:
    content = store.read(RECORD)
    return json.loads(content) if content is not None else {}


def keep(store: ObjectStore, **parts: Any) -> dict[str, Any]:
    record = read_record(store) | parts
    store.write(RECORD, (json.dumps(record, indent=2) + "\n").encode())
    return record
