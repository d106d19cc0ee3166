"""What every Ray Train worker runs. Ray is here; the algorithm is in `loop.py`."""

import contextlib
import os
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch

from ftray.config import RunConfig
from ftray.data.plan import plan_steps
from ftray.data.tokens import TokenizedDataset
from ftray.errors import FtrayError, UserError
from ftray.model.adapter import inject_lora
from ftray.model.base import BaseModel, load_weights, prepare_base
from ftray.model.hardware import Hardware, choose_hardware, make_deterministic
from ftray.model.packed import PackedCausalLM, register_packed_attention
from ftray.objectives import OBJECTIVES
from ftray.storage import write_json
from ftray.tracking.metrics import MetricsLog
from ftray.tracking.wandb import Wandb
from ftray.train.checkpoint import TrainerState, newest_whole_checkpoint, read_state, restore, write_checkpoint
from ftray.train.engine import TrainEngine
from ftray.train.job import HARDWARE, WORKER_ERROR, TrainJob
from ftray.train.loop import Schedule, evaluation_rows, train
from ftray.train.schedule import make_schedule
from ftray.train.zero import shard_while_loading


def train_worker(job: TrainJob) -> None:
    """A `FtrayError` is the same on every try: it is written down for the driver, and Ray starts no new try."""
    try:
        run_job(job)
    except FtrayError as error:
        write_json(
            job.run_directory / WORKER_ERROR,
            {"message": str(error), "exit_code": error.exit_code, "traceback": traceback.format_exc()},
        )


def run_job(job: TrainJob) -> None:
    config = job.config
    rank = ray.train.get_context().get_world_rank()
    use_gpu = config.workers.gpus_each > 0
    if use_gpu:
        torch.cuda.set_device(ray.train.torch.get_device())  # the one of this local rank
    hardware = choose_hardware(use_gpu=use_gpu)
    make_deterministic(num_threads=config.workers.cpus_each)
    base = prepare_base(job.base_name)
    engine = make_engine(config, base, hardware)
    if rank == 0:
        write_json(job.run_directory / HARDWARE, {"hardware": str(hardware), "world_size": engine.world_size})
    checkpoint = newest_whole_checkpoint(job.run_directory)
    start_step = 0
    if checkpoint is not None:
        restore(checkpoint, engine)
        start_step = read_state(checkpoint).step

    dataset: TokenizedDataset = ray.get(job.train_data)
    eval_dataset: TokenizedDataset | None = ray.get(job.eval_data) if job.eval_data is not None else None
    plan = plan_steps(config, dataset.lengths)
    num_steps = plan.num_steps(epochs=config.epochs, max_steps=config.max_steps)
    schedule = Schedule(
        start_step=start_step,
        num_steps=num_steps,
        end_position=None if config.epochs is None else config.epochs * len(dataset),
        evaluate_every=config.evaluation.every,
        save_every=config.checkpoint.every,
    )
    evaluate = None
    if eval_dataset is not None:
        budget = config.batch.tokens_per_micro_batch
        rows = evaluation_rows(eval_dataset, token_budget=budget, world_size=engine.world_size, rank=rank)
        evaluate = lambda: engine.evaluate(rows())  # noqa: E731

    def save(step: int) -> None:
        state = TrainerState(step, job.data_digest, engine.world_size, config.zero.stage)
        with scratch_directory(job.run_directory) as directory:
            write_checkpoint(directory, engine, config, base, state, rank=rank)
            ray.train.report(
                {"step": step},
                checkpoint=ray.train.Checkpoint.from_directory(directory) if rank == 0 else None,
                checkpoint_dir_name=f"step-{step}",
            )

    with recorder(job, start_step=start_step, rank=rank) as record:
        train(
            engine,
            dataset,
            plan,
            make_schedule(config.optimizer, num_steps=num_steps),
            schedule,
            rank=rank,
            seed=config.seed,
            evaluate=evaluate,
            on_step_end=lambda step: record(asdict(step)),
            on_evaluated=lambda step, loss: record({"step": step, "eval_loss": loss}),
            save=save,
        )


def make_engine(config: RunConfig, base: BaseModel, hardware: Hardware) -> TrainEngine:
    if config.zero.stage == 0 and hardware.dtype == torch.bfloat16:
        raise UserError("zero.stage: 0 has no float32 master weights and diverges in bfloat16; use stage 1, 2 or 3")
    sharding = shard_while_loading(config.zero.stage, hardware)
    model = load_weights(base, hardware, attention=register_packed_attention())
    if config.adapter is not None:
        inject_lora(model, config.adapter, seed=config.seed)
    objective = OBJECTIVES[config.objective.type]
    return TrainEngine(
        PackedCausalLM(model), objective, hardware, config.optimizer, stage=config.zero.stage, sharding=sharding
    )


@contextlib.contextmanager
def recorder(job: TrainJob, *, start_step: int, rank: int) -> Iterator[Any]:
    """Rank 0 writes metrics.jsonl and wandb; the others nothing."""
    if rank != 0:
        yield lambda record: None
        return
    config = job.config
    metrics = MetricsLog(job.run_directory, resume_step=start_step)
    wandb = Wandb(
        config.tracking,
        run_name=config.name,
        settings=config.model_dump(mode="json"),
        directory=job.run_directory,
        say=print,
    )

    def record(entry: dict[str, Any]) -> None:
        metrics.append(entry)
        wandb.log(entry)

    try:
        yield record
    finally:
        metrics.close()
        wandb.finish()


@contextlib.contextmanager
def scratch_directory(run_directory: Path) -> Iterator[Path]:
    """Beside the run, so that a checkpoint is written where there is room for it."""
    os.makedirs(run_directory / "scratch", exist_ok=True)
    with tempfile.TemporaryDirectory(dir=run_directory / "scratch") as directory:
        yield Path(directory)
