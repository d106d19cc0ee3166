"""What every Ray Train worker runs. Ray is here; the algorithm is in `loop.py`."""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import ray.train
import ray.train.torch
import torch

from ftray.config import RunConfig
from ftray.data.dataset import TokenizedDataset, open_dataset
from ftray.data.examples import dataset_source
from ftray.errors import DamagedError, FtrayError, UserError
from ftray.model.adapters.directory import local_adapter
from ftray.model.base import BaseModel, prepare_base
from ftray.model.hardware import Hardware, choose_hardware, make_deterministic
from ftray.model.packed import (
    can_compile,
    compile_layers,
)
from ftray.storage import write_json
from ftray.tracking.events import record_event
from ftray.train.checkpoints.checkpoint import restore
from ftray.train.checkpoints.listing import Checkpoints, first_whole, read_state
from ftray.train.engine.build import make_engine
from ftray.train.engine.deepspeed import DeepSpeedEngine
from ftray.train.engine.schedule import make_schedule
from ftray.train.hooks.callbacks import Record, WorkerCallbacks, skipped_steps
from ftray.train.hooks.recorder import Recorder
from ftray.train.hooks.samples import Sampler
from ftray.train.job import HARDWARE, TrainJob, write_worker_error
from ftray.train.loop import Schedule, Training, evaluator, train
from ftray.train.loss_guard import LossGuard, recent_losses
from ftray.train.on_ray.communication import describe_bandwidth, measure_all_reduce
from ftray.train.on_ray.rank_run import RankRun, open_rank_run

COMPILE_AFTER_S = 900.0  # of a worker's nominal work: compiling takes a minute
NOMINAL_RATE = {"cpu": 5e10, "cuda": 4e14}  # FLOPs a second
WORKERS_STARTED = "workers_started"  # in events.jsonl


def train_worker(job: TrainJob) -> None:
    """A `FtrayError` is the same on every try: it is written down for the driver, and Ray starts no new try."""
    rank = ray.train.get_context().get_world_rank()
    with open_rank_run(job, rank=rank) as run:
        try:
            run_job(run, rank=rank)
        except FtrayError as error:
            write_worker_error(run.job.run_directory, error)


def run_job(run: RankRun, *, rank: int) -> None:
    config = run.job.config
    hardware = take_device(config)
    bandwidth = measure_all_reduce(hardware)
    run.begin()  # not before: a rank that fetches the data would keep the others waiting there
    job = run.job
    base = find_base(job)
    engine = make_engine(config, base, hardware, init_from=find_start(job))
    start_step = resume(engine, run.checkpoints, rank=rank)
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
            publish=functools.partial(run.publish, engine),
            upload=run.upload,
            keep_notes=run.push_notes,
            row_name=dataset.row_name,
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
    base = prepare_base(job.base_name, chat=job.config.chat)
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
    source, token_budget = dataset_source(config, dataset), config.batch.tokens_per_micro_batch
    schedule = Schedule(
        start_step=start_step,
        num_steps=source.num_steps,
        evaluate_every=config.evaluation.every,
        save_every=config.checkpoint.every,
        learning_rate=make_schedule(config.optimizer, num_steps=source.num_steps),
        skipped=engine.gather(skipped_steps(job.run_directory))[0],
    )
    training = Training(source, schedule, config.seed, token_budget)
    if eval_dataset is None:
        return training
    return replace(training, evaluate=evaluator(eval_dataset, engine, token_budget=token_budget))


def worth_compiling(config: RunConfig, engine: DeepSpeedEngine, dataset: TokenizedDataset, *, num_steps: int) -> bool:
    """`compile: auto`. It depends on the run and the number of workers alone, so that a resumed run computes as
    its first part did. At ZeRO-3 each layer's hooks would cut what is compiled.
    """
    if config.compile != "auto" or config.zero.stage == 3 or not can_compile(engine.model.model):
        return False
    mean = len(dataset.ids) / len(dataset)
    tokens = int(mean * config.batch.examples_per_step * num_steps)
    flops = engine.meter.model.step(
        num_tokens=tokens,
        num_trained=int(tokens * dataset.trained_lengths.sum() / len(dataset.ids)),
        lengths={mean: tokens / mean},
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
