"""What every Ray Train worker runs. Ray is here; the algorithm is in `loop.py`."""

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path

import ray.train
import ray.train.torch
import torch

from ftray.config import RunConfig
from ftray.data.dataset import TokenizedDataset, open_dataset
from ftray.data.plan import plan_steps
from ftray.errors import DamagedError, FtrayError, UserError
from ftray.model.adapter import local_adapter
from ftray.model.base import BaseModel, prepare_base
from ftray.model.hardware import Hardware, choose_hardware, make_deterministic
from ftray.model.packed import (
    can_compile,
    compile_layers,
)
from ftray.storage import remove_unlisted, write_json
from ftray.storage.manifest import MANIFEST
from ftray.tracking.events import record_event
from ftray.train.checkpoints.checkpoint import (
    CHECKPOINTS,
    Checkpoints,
    DirectoryCheckpoints,
    first_whole,
    read_state,
    restore,
)
from ftray.train.checkpoints.saver import Publish
from ftray.train.checkpoints.stored import StoredCheckpoints
from ftray.train.engine.build import make_engine
from ftray.train.engine.deepspeed import DeepSpeedEngine
from ftray.train.engine.schedule import make_schedule
from ftray.train.hooks.callbacks import Record, WorkerCallbacks, skipped_steps
from ftray.train.hooks.recorder import Recorder
from ftray.train.hooks.samples import Sampler
from ftray.train.job import HARDWARE, TrainJob, write_worker_error
from ftray.train.loop import Schedule, Training, evaluation_rows, train
from ftray.train.loss_guard import LossGuard, recent_losses
from ftray.train.on_ray.communication import describe_bandwidth, measure_all_reduce
from ftray.train.runs.store import WorkerNotes, on_this_machine

COMPILE_AFTER_S = 900.0  # of a worker's nominal work: compiling takes a minute
NOMINAL_RATE = {"cpu": 5e10, "cuda": 4e14}  # FLOPs a second
WORKERS_STARTED = "workers_started"  # in events.jsonl


def train_worker(job: TrainJob) -> None:
    """A `FtrayError` is the same on every try: it is written down for the driver, and Ray starts no new try."""
    rank = ray.train.get_context().get_world_rank()
    with on_this_machine(job, rank=rank) as (here, notes):
        try:
            run_job(here, notes, rank=rank)
        except FtrayError as error:
            write_worker_error(here.run_directory, error)


def run_job(job: TrainJob, notes: WorkerNotes | None, *, rank: int) -> None:
    """`notes`: of a run in an object store, which gets its checkpoints too."""
    config = job.config
    hardware = take_device(config)
    bandwidth = measure_all_reduce(hardware)
    if notes is not None:
        job = notes.begin(job)  # not before: a rank that fetches the data would keep the others waiting there
    base = find_base(job)
    engine = make_engine(config, base, hardware, init_from=find_start(job))
    stored = StoredCheckpoints(job.run_url) if job.run_url is not None else None
    start_step = resume(engine, stored or DirectoryCheckpoints(job.run_directory), rank=rank)
    if rank == 0:
        described = f"{hardware}{describe_bandwidth(bandwidth)}"
        write_json(job.run_directory / HARDWARE, {"hardware": described, "world_size": engine.world_size})
        record_event(job.run_directory, WORKERS_STARTED, after_step=start_step, workers=engine.world_size)

    dataset = open_dataset(Path(job.train_data))
    eval_dataset = open_dataset(Path(job.eval_data)) if job.eval_data is not None else None
    training = make_training(job, engine, dataset, eval_dataset, start_step=start_step)
    if worth_compiling(config, engine, dataset, num_steps=training.schedule.num_steps):
        compile_layers(engine.model.model)
    losses = recent_losses(job.run_directory, until_step=start_step)
    guard = LossGuard(config.guard, earlier_losses=engine.gather(losses)[0])
    with recorder(job, start_step=start_step, rank=rank) as record:
        callbacks = WorkerCallbacks(
            job,
            engine,
            base,
            record=record,
            sample=Sampler(job, engine, base, eval_dataset, rank=rank).sample,
            upload=stored.upload if stored is not None else None,
            keep_notes=notes.push_at_once if notes is not None else None,
            publish=publisher(job, engine, stored, notes),
        )
        train(engine, training, guard, callbacks)
        callbacks.close()


def take_device(config: RunConfig) -> Hardware:
    """This rank's, made deterministic."""
    use_gpu = config.workers.gpus_each > 0
    if use_gpu:
        torch.cuda.set_device(ray.train.torch.get_device())  # the one of this local rank
    make_deterministic(num_threads=config.workers.cpus_each)
    return choose_hardware(use_gpu=use_gpu)


def find_base(job: TrainJob) -> BaseModel:
    base = prepare_base(job.base_name)
    if base.fingerprint != job.base_fingerprint:
        raise UserError(
            f"base_model: {job.base_name} is another model on this node than the driver had (its files were changed); "
            "put the old ones back, or start over with --fresh"
        )
    return base


def find_start(job: TrainJob) -> Path | None:
    """This machine's copy of the adapter that `adapter.init_from` names."""
    if job.init_from is None:
        return None
    directory = local_adapter(job.init_from)
    if directory is None:
        raise UserError(
            f"adapter.init_from: {job.init_from} is not to be seen on this node; give a shared path or a URL"
        )
    return directory


def make_training(
    job: TrainJob,
    engine: DeepSpeedEngine,
    dataset: TokenizedDataset,
    eval_dataset: TokenizedDataset | None,
    *,
    start_step: int,
) -> Training:
    config = job.config
    plan = plan_steps(config, dataset.lengths)
    num_steps = plan.num_steps(epochs=config.epochs, max_steps=config.max_steps)
    schedule = Schedule(
        start_step=start_step,
        num_steps=num_steps,
        end_position=None if config.epochs is None else config.epochs * len(dataset),
        evaluate_every=config.evaluation.every,
        save_every=config.checkpoint.every,
        learning_rate=make_schedule(config.optimizer, num_steps=num_steps),
        skipped=engine.gather(skipped_steps(job.run_directory))[0],
    )
    if eval_dataset is None:
        return Training(dataset, plan, schedule)
    rows = evaluation_rows(eval_dataset, engine, token_budget=config.batch.tokens_per_micro_batch)
    return Training(dataset, plan, schedule, evaluate=lambda: engine.evaluate(rows()))


def worth_compiling(config: RunConfig, engine: DeepSpeedEngine, dataset: TokenizedDataset, *, num_steps: int) -> bool:
    """`memory.compile: auto`. It depends on the run and the number of workers alone, so that a resumed run computes as
    its first part did. At ZeRO-3 each layer's hooks would cut what is compiled.
    """
    if config.memory.compile != "auto" or config.zero.stage == 3 or not can_compile(engine.model.model):
        return False
    mean = len(dataset.ids) / len(dataset)
    tokens = int(mean * config.batch.examples_per_step * num_steps)
    flops = engine.meter.model.step(
        num_tokens=tokens,
        num_trained=int(tokens * dataset.trained_lengths.sum() / len(dataset.ids)),
        sum_squared_lengths=int(tokens * mean),
        trains_base=engine.meter.trains_base,
        reference=engine.meter.reference,
    )
    return flops / engine.world_size > COMPILE_AFTER_S * NOMINAL_RATE[engine.hardware.device.type]


def resume(engine: DeepSpeedEngine, checkpoints: Checkpoints, *, rank: int) -> int:
    """Puts the newest whole checkpoint back, if there is one; returns the steps done. The ranks share the checking."""

    def open_on_all_ranks(place: str) -> Path:
        path, problem = None, None
        try:
            path = checkpoints.open(place, share=(rank, engine.world_size))
        except FtrayError as error:
            problem = error
        problems = [found for found in engine.gather(problem) if found is not None]
        for found in sorted(problems, key=lambda found: isinstance(found, DamagedError)):  # another reason ends the run
            raise found
        assert path is not None
        return path

    listed = engine.gather(checkpoints.list())[0]  # a shared disk may show another rank another list
    checkpoint = first_whole(listed, opened=open_on_all_ranks)
    if checkpoint is None:
        return 0
    restore(checkpoint, engine)
    return read_state(checkpoint).step


def publisher(
    job: TrainJob, engine: DeepSpeedEngine, stored: StoredCheckpoints | None, notes: WorkerNotes | None
) -> Publish:
    """What makes a rank's files part of a checkpoint, where the run lies."""
    if stored is None:
        return functools.partial(publish, job, rank=engine.rank)
    return functools.partial(publish_in_store, engine, stored, notes, keep=job.config.checkpoint.keep)


def publish(job: TrainJob, directory: Path, step: int, *, rank: int) -> None:
    """The one place that reports to Ray Train. The files move, since scratch and checkpoints share a disk."""

    def move(_: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
        target = job.run_directory / CHECKPOINTS / name
        manifest = directory / MANIFEST
        for path in sorted((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p == manifest):
            place = target / path.relative_to(directory)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, place)
        if rank == 0:
            remove_unlisted(target)  # of an earlier save of this step, by more ranks
        return ray.train.Checkpoint(str(target))

    ray.train.report(
        {"step": step},
        checkpoint=ray.train.Checkpoint.from_directory(directory),
        checkpoint_dir_name=f"step-{step}",
        checkpoint_upload_fn=move,
    )


def publish_in_store(
    engine: DeepSpeedEngine,
    stored: StoredCheckpoints,
    notes: WorkerNotes | None,
    directory: Path,
    step: int,
    *,
    keep: int,
) -> None:
    """Every rank's files are there; the notes of the steps before come first. Raises on all ranks alike."""
    problem = None
    if (directory / MANIFEST).is_file():  # rank 0
        assert notes is not None
        try:
            notes.push_at_once()
            stored.complete(directory, step, keep=keep)
        except (FtrayError, OSError) as error:
            problem = str(error)
    if problem := engine.gather(problem)[0]:
        raise FtrayError(f"the checkpoint of step {step} could not be completed: {problem}")


@contextlib.contextmanager
def recorder(job: TrainJob, *, start_step: int, rank: int) -> Iterator[Record]:
    """Rank 0 keeps what it is given; the others nothing."""
    if rank != 0:
        yield lambda record: None
        return
    kept = Recorder(job.config, job.run_directory, resume_step=start_step)
    try:
        yield kept.record
    finally:
        kept.close()
