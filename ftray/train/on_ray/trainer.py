"""Ray Train from the driver's side: starts the workers, follows what they write, and starts again what can be."""

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ftray.cluster.fit_thread import Fit, last_line
from ftray.cluster.session import logs_directory
from ftray.cluster.worker_env import passed_secrets, worker_environment
from ftray.config.run import WorkersConfig
from ftray.errors import FtrayError
from ftray.storage import check_sizes, read_json
from ftray.tracking.events import record_driver_event
from ftray.tracking.metrics import MetricsFollower
from ftray.tracking.status import RUNNING, write_status
from ftray.train.checkpoints.listing import CHECKPOINTS, read_state
from ftray.train.hooks.failed_saves import FailedSaves
from ftray.train.hooks.watchdog import HangReader, clear_hangs
from ftray.train.job import HARDWARE, WORKER_ERROR, TrainJob, read_worker_error
from ftray.train.on_ray.controller_notes import unkept_notes
from ftray.train.on_ray.entry import run_in_worker
from ftray.train.runs.handle import RunHandle
from ftray.train.runs.uri import is_stored

POLL_S = 0.2
NO_ROOM = os.strerror(errno.ENOSPC)
RETRY_S = 10.0
ERROR_GRACE_S = 20.0
# Elastic workers: how often Ray looks for hosts that came; a larger group starts from the last checkpoint.
RESIZE_CHECK_S = 30.0
# `ray.train.report` and a run's end wait until Ray Train's controller asks its workers the next time: with its own 2 s
# every checkpoint stops the training for as long. Large groups are asked less often.
POLL_INTERVAL = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"
POLL_INTERVAL_BY_USER = POLL_INTERVAL in os.environ
WORKERS_ASKED_PER_S = 128
# A process of Ray's for each run, which tells workers of a spot node's end; nobody listens to it here.
PREEMPTION_WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"


@dataclass(frozen=True)
class Watcher:
    """How a run is shown; the CLI draws, tests collect."""

    log: Callable[[str], None]
    on_metrics: Callable[[list[dict[str, Any]]], None]
    on_start: Callable[[int, int], None]  # (first step, number of steps)

    def calling_also(self, on_metrics: Callable[[list[dict[str, Any]]], None]) -> "Watcher":
        def on_both(records: list[dict[str, Any]]) -> None:
            self.on_metrics(records)
            on_metrics(records)

        return replace(self, on_metrics=on_both)


def train_on_ray(
    job: TrainJob, run: RunHandle, watcher: Watcher, *, num_steps: int, on_workers: Callable[[], None]
) -> None:
    """`on_workers`: called when they have started, which takes as long as a cluster is full. Ray Train replaces workers
    that fail; when its own controller fails (a full disk under its notes), it is started again here, and the workers go
    on from the last checkpoint."""
    from ray.train import ControllerError

    (run.path / WORKER_ERROR).unlink(missing_ok=True)
    start = read_state(run.resume_from).step if run.resume_from is not None else 0
    watcher.on_start(start, num_steps)
    for tries_left in reversed(range(job.config.workers.max_failures + 1)):
        clear_ray_notes(run.path / CHECKPOINTS)
        failure = fit_and_follow(make_trainer(job), run, watcher, on_workers)
        if failure is None:
            return
        if tries_left == 0 or not isinstance(failure, ControllerError):
            if NO_ROOM in str(failure):
                raise FtrayError(
                    f"{run.uri}: the disk is full ({NO_ROOM}); what was saved before stands. Make room, and the same "
                    "command goes on"
                ) from failure
            message = f"training failed: {last_line(failure)}; the workers' logs are in {logs_directory()}"
            raise FtrayError(message) from failure
        watcher.log(f"Ray Train stopped ({last_line(failure)}); tries again in {RETRY_S:.0f} s")
        time.sleep(RETRY_S)
        with contextlib.suppress(OSError):
            record_driver_event(run.path, "controller_failed", message=last_line(failure))


def make_trainer(job: TrainJob) -> Any:
    from ray.train import CheckpointConfig, FailureConfig, RunConfig as RayRunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer  # TorchTrainer's base

    from ftray.train.on_ray.process_group import process_group_of

    workers, guard = job.config.workers, job.config.guard
    set_ray_train(workers.max_count)
    skips = guard.max_skips if guard.on_bad_loss == "skip" else 0  # each is a restart
    return DataParallelTrainer(
        run_in_worker,
        train_loop_config={"job": job, "secrets": passed_secrets()},
        backend_config=process_group_of(workers),
        scaling_config=ScalingConfig(
            num_workers=workers.count if isinstance(workers.count, int) else (workers.min_count, workers.max_count),
            use_gpu=workers.gpus_each > 0,
            resources_per_worker=bundle_of(workers),
            elastic_resize_monitor_interval_s=RESIZE_CHECK_S,
        ),
        run_config=RayRunConfig(
            name=CHECKPOINTS,  # so that a checkpoint lies at runs/NAME/checkpoints/step-N
            storage_path=str(job.run_directory),
            storage_filesystem=unkept_notes() if is_stored(job.uri) else None,
            failure_config=FailureConfig(max_failures=workers.max_failures + skips),
            checkpoint_config=CheckpointConfig(num_to_keep=job.config.checkpoint.keep),
            worker_runtime_env={"env_vars": worker_environment(workers.gpus_each)},
        ),
    )


def set_ray_train(num_workers: int) -> None:
    """Ray Train's settings, which it reads from the environment."""
    os.environ.setdefault(PREEMPTION_WATCHER, "0")
    if not POLL_INTERVAL_BY_USER:
        os.environ[POLL_INTERVAL] = f"{min(2.0, max(0.25, num_workers / WORKERS_ASKED_PER_S)):g}"


def bundle_of(workers: WorkersConfig) -> dict[str, float]:
    return {"CPU": float(workers.cpus_each)} | ({"GPU": float(workers.gpus_each)} if workers.gpus_each else {})


def clear_ray_notes(checkpoints: Path) -> None:
    """What an earlier part of the run left there and Ray would stumble over.

    A checkpoint that is damaged is made again, under its old name; Ray, which had it on its list, would later delete
    the new one for the old one. So its list goes; which checkpoints there are, their manifests say.
    """
    shutil.rmtree(checkpoints / ".validate_storage_marker", ignore_errors=True)
    notes = checkpoints / "checkpoint_manager_snapshot.json"
    try:
        if notes.is_file():
            for result in read_json(notes)["checkpoint_results"]:
                check_sizes(checkpoints / result["checkpoint_dir_name"])
    except (ValueError, KeyError, FtrayError):  # the list is cut short, or a checkpoint is
        notes.unlink()


def fit_and_follow(
    trainer: Any, run: RunHandle, watcher: Watcher, on_workers: Callable[[], None]
) -> BaseException | None:
    """Returns Ray's failure, if there is one; raises what the workers themselves said.

    `fit` runs in a thread (in the main one it would take over Ctrl-C); here the metrics are followed meanwhile.
    """
    run_directory = run.path
    (run_directory / HARDWARE).unlink(missing_ok=True)
    clear_hangs(run_directory)
    workers: dict[str, Any] | None = None  # as rank 0 described them at their last start
    follower, hangs, saves = MetricsFollower(run_directory), HangReader(run_directory), FailedSaves(run_directory)
    follower.poll()  # what an earlier part wrote
    saves.poll()
    thread = Fit(trainer)
    while thread.is_alive():
        thread.join(POLL_S)
        run.sync(at_once=not thread.is_alive())
        if (run_directory / HARDWARE).is_file() and (found := read_json(run_directory / HARDWARE)) != workers:
            workers = found
            write_status(run_directory, RUNNING)
            on_workers()
            watcher.log(f"{found['world_size']} workers run on {found['hardware']}")
        watcher.on_metrics(follower.poll())
        for problem in saves.poll():
            watcher.log(problem)
        if read_worker_error(run_directory) is not None:
            thread.join(ERROR_GRACE_S)  # other workers may wait for the one that has given up
            break
        if workers is not None and (hang := hangs.poll(world_size=workers["world_size"])):
            record_driver_event(run_directory, "hang", message=hang)
            watcher.log(f"{hang}; the workers start again from the last checkpoint")
    watcher.on_metrics(follower.poll())
    if (reported := read_worker_error(run_directory)) is not None:
        raise reported
    return thread.failure
