"""`ftray pipeline`: runs in order, each from the result of the one before, then measured, judged and published. A stage
that was done stands: the same command goes on with the next."""

from collections.abc import Callable
from dataclasses import asdict, dataclass

from ftray.artifacts.publish import publish_if_new, publish_once
from ftray.artifacts.resolve import resolve_start
from ftray.config import PipelineConfig, RunConfig
from ftray.errors import FtrayError, UserError
from ftray.evaluate.scores import Score
from ftray.model.adapters.directory import local_adapter
from ftray.pipeline.check import check_pipeline, load_stage, points_of, start_from
from ftray.pipeline.record import keep, read_record
from ftray.pipeline.scores import Artifact, Condition, digest_of_weights, judge, measured_once
from ftray.registry import AdapterVersion, Registry
from ftray.storage import ObjectStore
from ftray.sweep.launch import run_sweep
from ftray.train.launch import launch
from ftray.train.on_ray.trainer import Watcher
from ftray.train.prepare import prepare


@dataclass(frozen=True)
class Outcome:
    artifact: Artifact
    scores: dict[str, Score]  # of `base` and `tuned`; none: nothing was to be measured
    conditions: list[Condition]
    version: AdapterVersion | None


def run_pipeline(
    config: PipelineConfig, watcher: Watcher, announce: Callable[[str], None], *, fresh: bool = False
) -> Outcome:
    """`fresh`: earlier runs are set aside. Raises `FtrayError` where a condition does not hold: then nothing is
    published."""
    pipeline = check_pipeline(config)
    store = ObjectStore(pipeline.record_uri)
    if fresh:
        keep(store, started_from={})
    artifact: Artifact | None = None
    for number, path in enumerate(config.train, start=1):
        announce(f"{number} of {len(config.train)}: {path}")
        artifact = train_stage(config, path, watcher, store, after=artifact, fresh=fresh)
    assert artifact is not None
    scores: dict[str, Score] = {}
    if pipeline.measures:
        announce("measuring the base and what was made of it")
        scores = measured_once(config, artifact, store, log=watcher.log)
    conditions = [judge(text, scores) for text in config.require]
    for condition in conditions:
        watcher.log(str(condition))
    version = None
    if all(condition.holds for condition in conditions) and config.publish is not None:
        version = publish_stage(config, artifact, scores)
    record = {
        "pipeline": config.model_dump(mode="json"),
        "product": artifact.uri,
        "conditions": [asdict(condition) for condition in conditions],
        "version": str(version) if version is not None else None,
    }
    keep(store, **record)
    if failed := [condition for condition in conditions if not condition.holds]:
        raise FtrayError(f"{config.name}: nothing was published: {failed[0]}; {artifact.uri} stands")
    return Outcome(artifact, scores, conditions, version)


def train_stage(
    config: PipelineConfig, path: str, watcher: Watcher, store: ObjectStore, *, after: Artifact | None, fresh: bool
) -> Artifact:
    start = start_from(after.uri, is_adapter=after.is_adapter) if after is not None else None
    stage = load_stage(config, path, start)
    if after is not None:
        note_start(store, points_of(stage)[0].name, after)
    if isinstance(stage, RunConfig):
        prepared = resolve_start(prepare(stage, fresh=fresh))
        result, run = launch(prepared, watcher), prepared.config
        return Artifact(run, result["output"], {"run": run.name})
    sweep, space = stage
    study = run_sweep(sweep, space, log=watcher.log, fresh=fresh)
    best = study.best_run
    if best is None:
        raise FtrayError(f"{sweep.name}: no trial finished")
    return Artifact(study.config_of(best), study.artifact_of(best), study.lineage_of(best))


def note_start(store: ObjectStore, name: str, artifact: Artifact) -> None:
    """A run that was trained from another product than there is now is not what its config says. Raises `UserError`."""
    started = read_record(store).get("started_from", {})
    digest = digest_of_weights(artifact)
    if started.get(name, digest) != digest:
        raise UserError(
            f"{name}: was trained from other weights than {artifact.uri} holds now; train all of it again with --fresh"
        )
    keep(store, started_from=started | {name: digest})


def publish_stage(config: PipelineConfig, artifact: Artifact, scores: dict[str, Score]) -> AdapterVersion:
    """The same weights are published once, whoever asks again; the alias moves where it does not point there yet."""
    assert config.publish is not None
    directory = local_adapter(artifact.uri)
    if directory is None:
        raise FtrayError(f"{artifact.uri}: is gone")
    registry = Registry(artifact.run.registry)
    measured = {name: {k: v for k, v in asdict(score).items() if v is not None} for name, score in scores.items()}
    lineage = artifact.lineage | {"pipeline": config.name, "measured": measured}
    name, alias = config.publish.name, config.publish.alias
    if alias is None:
        return publish_if_new(registry, name, directory, lineage=lineage)
    return publish_once(registry, name, directory, alias=alias, lineage=lineage)
