"""The driver's side of a run: check, tokenise while Ray starts, train, and leave a complete run directory."""

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from ftray.cluster.probe import check_nodes
from ftray.cluster.resources import check_resources, nodes_for
from ftray.cluster.session import logs_directory, start_ray
from ftray.cluster.signals import Stop, stoppable
from ftray.cluster.weight_broadcast import broadcast_base
from ftray.errors import FtrayError, InterruptedRunError
from ftray.model.base import BaseModel
from ftray.tracking.events import record_driver_event
from ftray.tracking.runs import RESULT, TOKENS
from ftray.tracking.status import QUEUED, write_status
from ftray.train.checkpoints.disk_space import check_disk
from ftray.train.checkpoints.listing import read_state
from ftray.train.hooks.own_callbacks import calling
from ftray.train.job import STOP_REQUEST, TrainJob, request_stop
from ftray.train.on_ray.trainer import Watcher, train_on_ray
from ftray.train.prepare import PreparedRun
from ftray.train.prepared_data import PreparedData, is_complete, prepare_data_apart, rendering_as
from ftray.train.runs.claim import PLACES
from ftray.train.runs.finalize import describe_interruption, finalize_run, remake_artifact
from ftray.train.runs.handle import RunHandle
from ftray.train.runs.inputs import check_inputs, date_before
from ftray.train.runs.live_report import live_report
from ftray.train.runs.rank_directory import new_attempt
from ftray.train.runs.store import run_store, share_data

Log = Callable[[str], None]


def launch(
    prepared: PreparedRun, watcher: Watcher, *, profile_steps: int = 0, until_step: int | None = None
) -> dict[str, Any]:
    """Runs, or goes on with, the run and returns what its result.json says.

    `profile_steps`: of rank 0, traced. `until_step`: it saves there and raises `InterruptedRunError`; the same call
    with a later one goes on.
    """
    began = time.time()
    config = prepared.config
    with run_store(config.runs_dir).open(config, fresh=prepared.fresh) as run:
        for note in run.notes:
            watcher.log(note)
        if run.finished is not None:
            return standing_result(run, watcher.log)
        for change in run.changes:
            watcher.log(f"goes on with a changed setting: {change}")
        (run.path / STOP_REQUEST).unlink(missing_ok=True)
        stop = functools.partial(request_stop, run.path)
        with (
            stoppable() as asked,
            live_report(run.path) as on_record,
            calling(prepared.callbacks, stop=stop) as on_metrics,
            session(run, asked),
        ):
            watcher = watcher.calling_also(on_metrics).calling_also(on_record)
            base, data = check_and_prepare(run, watcher.log, asked)
            write_status(run.path, QUEUED, num_steps=data.num_steps)
            job = make_job(run, base, data, init_from=prepared.init_from)
            job = replace(job, profile_steps=profile_steps, until_step=until_step)
            checkpoint = train_until_stopped(job, run, data, watcher, asked)
        return finalize_run(run, checkpoint, base, data, seconds=time.time() - began)


@contextlib.contextmanager
def session(run: RunHandle, asked: Stop) -> Iterator[None]:
    """Of Ray, where the process has none: `check_and_prepare` starts it, and it ends with the training."""
    own = not ray.is_initialized()
    try:
        yield
    except KeyboardInterrupt:
        own = False  # a thread still waits for Ray, which would end the process before its message is printed
        record_driver_event(run.path, "stopped", by=asked.asked_by or "Ctrl-C")
        raise asked.error(describe_interruption(run)) from None
    except InterruptedRunError:
        own = False  # its caller ends Ray: within `ray.shutdown` a second SIGTERM would end this process unheard
        raise
    finally:
        if own:
            ray.shutdown()


def check_and_prepare(run: RunHandle, log: Log, asked: Stop) -> tuple[BaseModel, PreparedData]:
    """Base and data are made ready while Ray starts and its nodes are asked. Raises `UserError`."""
    config = run.config
    with ThreadPoolExecutor(max_workers=1) as pool, set_on_failure() as cancelled:
        how = {"kept_in": run.path.parent / TOKENS, "date": date_before(run), "cancelled": cancelled}
        preparing = pool.submit(prepare_data_apart, config, log, **how)
        if not ray.is_initialized():
            start_ray(run=config.name)
            asked.take_over()
        check_resources(config.workers, log=log)
        check_nodes(run.shared_disk, config.workers)
        base, data = preparing.result()
        broadcast_base(config.base_model, nodes_for(config.workers), log=log)
    is_done = run.resume_from is not None and is_complete(run.resume_from, data)
    if run.shared_disk is not None and not is_done:
        check_disk(config, base, run.shared_disk)
    check_inputs(run, base, data)
    if run.resume_from is not None:
        log(f"resumes from {run.uri_of(run.resume_from)}")
    return base, data


def standing_result(run: RunHandle, log: Log) -> dict[str, Any]:
    """Of a run that is finished: its inputs are those that it had, where they lie elsewhere now, and what it left is
    there, or made again."""
    if any(change.partition(":")[0] in PLACES for change in run.changes):
        how = {"kept_in": run.path.parent / TOKENS, "date": date_before(run)}
        check_inputs(run, *prepare_data_apart(run.config, log, **how))
    remake_artifact(run, log)
    assert run.finished is not None
    log(f"{run.config.name} is finished already; its result stands ({run.uri_of(run.path / RESULT)})")
    return run.finished | {"output": run.uri_of(run.artifact)}


def make_job(run: RunHandle, base: BaseModel, data: PreparedData, *, init_from: Path | str | None) -> TrainJob:
    """What the workers get."""
    train, evaluation = share_data(run_store(run.config.runs_dir), data)
    return TrainJob(
        config=rendering_as(base, run.config),
        uri=run.uri,
        run_directory=run.path,
        base_name=base.name_for_workers,
        base_fingerprint=base.fingerprint,
        init_from=init_from,
        data_digest=data.digest,
        train_data=train,
        eval_data=evaluation,
        attempt=new_attempt(),
    )


def train_until_stopped(job: TrainJob, run: RunHandle, data: PreparedData, watcher: Watcher, asked: Stop) -> Path:
    """The last checkpoint of a run that came to its end. Raises `InterruptedRunError` where it was stopped before."""

    def save_and_end() -> None:
        request_stop(run.path)
        watcher.log(f"{asked.asked_by}: saves at the end of the step it is in, and ends; Ctrl-C ends at once")

    train_on_ray(job, run, watcher, num_steps=data.num_steps, on_workers=lambda: asked.saves_by(save_and_end))
    checkpoint = run.newest_checkpoint()
    if checkpoint is None:
        raise FtrayError(f"{run.uri}: ended without a checkpoint; the workers' logs are in {logs_directory()}")
    if is_complete(checkpoint, data):
        return checkpoint
    if read_state(checkpoint).step != job.until_step:
        record_driver_event(run.path, "stopped", by=asked.asked_by or "ftray runs stop")
    raise asked.error(describe_interruption(run))


@contextlib.contextmanager
def set_on_failure() -> Iterator[threading.Event]:
    event = threading.Event()
    try:
        yield event
    except BaseException:
        event.set()
        raise
