"""The measurements behind `compare`: products scored in Ray tasks, and short runs alone."""

import statistics
from collections.abc import Callable
from pathlib import Path

import ray
from ray.exceptions import RayError

from ftray.cluster.fit_thread import last_line
from ftray.cluster.worker_env import passed_secrets, worker_environment
from ftray.config import RunConfig
from ftray.config.chat import ChatConfig
from ftray.data.sources import is_several
from ftray.evaluate.scores import Score, ScoreJob, score_artifacts
from ftray.model.base import BaseModel
from ftray.sweep.compare.comparison import BASE, Alone, compared_trials, note_measured, read_measured
from ftray.sweep.study import Study
from ftray.sweep.trials import SweepRun
from ftray.tracking.metrics import read_metrics
from ftray.tracking.runs import TOKENS
from ftray.train.launch import launch
from ftray.train.on_ray.trainer import Watcher
from ftray.train.prepare import prepare
from ftray.train.runs.store import run_store

ALONE = "alone"
STEPS_ALONE = 6
WARM_UP_STEPS = 2
NEVER = 10**9  # steps
QUIET = Watcher(log=lambda text: None, on_metrics=lambda records: None, on_start=lambda first, count: None)

Log = Callable[[str], None]


def measure_methods(study: Study, directory: Path, base: BaseModel, *, log: Log) -> None:
    """What is not in the sweep's comparison yet, of each method's best trial."""
    trials = compared_trials(study)
    for job in score_jobs(study, directory, base, [run for trial in trials for run in trial.runs]):
        log(f"scoring {', '.join(job.adapters)}")
        try:
            note_measured(directory, "scores", score_in_task(job))
        except RayError as error:  # not noted: the same command tries again
            log(f"not scored: {', '.join(job.adapters)}: {last_line(error)}")
    for trial in trials:
        if trial.name not in read_measured(directory)["alone"]:
            log(f"{STEPS_ALONE} steps of {trial.name} alone")
            alone = measure_alone(study.config_of(trial.runs[0]), f"{study.uri}/{ALONE}")
            note_measured(directory, "alone", {trial.name: alone})
    run_store(f"{study.uri}/{ALONE}").forget(TOKENS)


def score_in_task(job: ScoreJob) -> dict[str, Score]:
    """With the resources of one of the run's workers. Raises Ray's errors."""
    environment = {"env_vars": worker_environment(job.run.workers.gpus_each)}
    scoring = ray.remote(score_artifacts).options(**job.needs, runtime_env=environment)
    return ray.get(scoring.remote(job, passed_secrets()))


def score_jobs(study: Study, directory: Path, base: BaseModel, runs: list[SweepRun]) -> list[ScoreJob]:
    """All adapters of one rendering in a job, the untuned base with the first; each trained model in one of its own."""
    compare = study.config.compare
    assert compare is not None
    done = read_measured(directory)["scores"]
    if not runs:
        return []
    shared = with_absolute_data(study.config_of(runs[0]))
    general = absolute(compare.general_text) if compare.general_text is not None else None
    base_name = base.name_for_workers
    adapters: dict[ChatConfig | None, dict[str, Path | str | None]] = (
        {} if BASE in done else {shared.chat: {BASE: None}}
    )
    jobs = []
    for run in runs:
        if run.name in done:
            continue
        config, artifact = with_absolute_data(study.config_of(run)), study.artifact_of(run)
        if config.adapter is not None:
            adapters.setdefault(config.chat, {})[run.name] = artifact
        else:
            jobs.append(ScoreJob(artifact, {run.name: None}, config, general))
    together = [
        ScoreJob(base_name, named, shared.model_copy(update={"chat": chat}), general)
        for chat, named in adapters.items()
    ]
    return [*together, *jobs]


def with_absolute_data(config: RunConfig) -> RunConfig:
    """A task does not run where the driver does."""
    return config.model_copy(update={"data": config.data.with_paths(absolute)})


def absolute(source: str) -> str:
    """A hub id stays as it is."""
    return str(Path(source).absolute()) if Path(source).exists() or is_several(source) else source


def measure_alone(config: RunConfig, runs_dir: str) -> Alone:
    data = config.data.model_copy(update={"eval": None})
    short = config.model_copy(
        update={
            "runs_dir": runs_dir,
            "epochs": None,
            "max_steps": STEPS_ALONE,
            "data": data,
            "checkpoint": config.checkpoint.model_copy(update={"every": NEVER}),
            "tracking": config.tracking.model_copy(update={"wandb": "off", "tensorboard": False}),
            "evaluation": config.evaluation.model_copy(update={"every": NEVER, "samples": 0}),
        }
    )
    launch(prepare(short), QUIET)
    store = run_store(runs_dir)
    steps = [record for record in read_metrics(store.local(config.name)) if "loss" in record]
    store.forget(config.name)
    rates = [step["tokens_per_s"] for step in steps[WARM_UP_STEPS:]] or [step["tokens_per_s"] for step in steps]
    return Alone(statistics.median(rates), max(step["memory_gib"] for step in steps))
