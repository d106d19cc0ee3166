"""The numbers behind a pipeline's conditions, and the verdict."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ray.exceptions import RayError

from ftray.cluster.fit_thread import last_line
from ftray.cluster.session import ray_session
from ftray.config import PipelineConfig, RunConfig
from ftray.config.expression import Expression
from ftray.data.sets import evaluated_sources
from ftray.errors import FtrayError
from ftray.evaluate.scores import Score, ScoreJob
from ftray.model.base import prepare_base
from ftray.pipeline.check import has_loss, load_stage, points_of
from ftray.pipeline.record import keep, read_record
from ftray.storage import ObjectStore
from ftray.storage.manifest import MANIFEST, sha256_of
from ftray.sweep.compare.comparison import BASE
from ftray.sweep.compare.measure import absolute, score_in_task, with_absolute_data

TUNED = "tuned"


@dataclass(frozen=True)
class Artifact:
    """What a stage of training left."""

    run: RunConfig
    uri: str  # path or URL of the adapter's or model's directory
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


def measured_once(
    config: PipelineConfig, artifact: Artifact, store: ObjectStore, *, log: Callable[[str], None]
) -> dict[str, Score]:
    """From the pipeline's record, where that is of the same weights and data."""
    digest = digest_of(config, artifact)
    recorded = read_record(store)
    if recorded.get("measured") != digest:
        found = {name: asdict(score) for name, score in measure(config, artifact)}
        if problems := [score["problem"] for score in found.values() if score["problem"]]:
            raise FtrayError(f"{artifact.uri}: cannot be measured: {problems[0]}")
        recorded = keep(store, measured=digest, scores=found)
    scores = {name: Score(**score) for name, score in recorded["scores"].items()}
    for name, score in scores.items():
        log(describe_score(name, score))
    return scores


def measure(config: PipelineConfig, artifact: Artifact) -> Iterator[tuple[str, Score]]:
    """In a Ray task with the resources of one of the run's workers, as it was trained."""
    run = with_absolute_data(artifact.run)
    first = points_of(load_stage(config, config.train[0]))[0]
    base = prepare_base(first.base_model)
    general = absolute(config.general_text) if config.general_text is not None else None
    named: dict[str, Path | str | None] = {BASE: None}
    base_name = base.name_for_workers
    jobs = [ScoreJob(base_name, named, run, general, held_out=has_loss(run))]
    if artifact.is_adapter and artifact.run.base_model == first.base_model:
        named[TUNED] = artifact.uri
    else:
        tuned: dict[str, Path | str | None] = {TUNED: artifact.uri if artifact.is_adapter else None}
        model = artifact.run.base_model if artifact.is_adapter else artifact.uri
        jobs.append(ScoreJob(model, tuned, run, general, held_out=has_loss(run)))
    with ray_session(run):
        for job in jobs:
            try:
                yield from score_in_task(job).items()
            except RayError as error:
                raise FtrayError(f"{artifact.uri}: cannot be measured: {last_line(error)}") from None


def digest_of(config: PipelineConfig, artifact: Artifact) -> str:
    """Of the weights and of what they are measured on."""
    data = artifact.run.data
    sources = [*(source.path for _, source in evaluated_sources(data)), config.general_text]
    contents = [sha256_of(Path(s)) if s is not None and Path(s).is_file() else s for s in sources]
    depends = [artifact.run.base_model, digest_of_weights(artifact), contents, str(data.held_out)]
    return hashlib.sha256(repr(depends).encode()).hexdigest()


def digest_of_weights(artifact: Artifact) -> str:
    """Its manifest has the hash of every file."""
    content = ObjectStore(artifact.uri).read(MANIFEST)
    if content is None:
        raise FtrayError(f"{artifact.uri}: has no {MANIFEST}; it was changed or removed")
    return hashlib.sha256(content).hexdigest()


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
    values = {key: value_of(key) for key in condition.keys}
    try:
        return Condition(text, values, holds=bool(condition.evaluate(value_of)))
    except ValueError:  # a ratio to an accuracy of 0, say
        return Condition(text, values, holds=False)
