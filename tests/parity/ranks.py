"""Trains on several gloo ranks without Ray: the loop, engine and checkpoints of the product, one process a rank.

    results = train_on_ranks(2, [Record(...), ...], tmp_path, base=..., train_file=...)
    results = Trainings([Record(...), ...], tmp_path, base=..., train_file=...)   # each when it is asked for

A group of processes runs every record of its world size, and on a CPU its processes are forked from one that has
imported what they need: starting one anew costs eight seconds.
"""

import contextlib
import dataclasses
import functools
import multiprocessing.forkserver
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing

sys.path.insert(0, str(Path(__file__).parents[1]))


@dataclass(frozen=True)
class Record:
    """One way to run the same training."""

    name: str
    world_size: int = 1
    stage: int = 0
    tokens_per_micro_batch: int = 4096
    steps: int = 4
    stop_after: int | None = None  # end early, as a crash would, after the checkpoint of this step
    resume_from: str | None = None  # a checkpoint; in `Trainings` the name of the record that made it
    full: bool = False
    dropout: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)
    break_it: str | None = None  # name of a sabotage in BREAKS

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Trained:
    losses: list[float]
    grad_norms: list[float]
    eval_losses: list[float]
    eval_metrics: list[dict[str, float]]
    start: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]
    checkpoint: str

    def change_from(self, other: "Trained") -> float:
        """Norm of the difference of the final weights over the norm of the change that training made."""
        difference = sum(((self.weights[k] - other.weights[k]) ** 2).sum().item() for k in self.weights)
        change = sum(((self.weights[k] - self.start[k]) ** 2).sum().item() for k in self.weights)
        return (difference / change) ** 0.5


def train_on_ranks(
    world_size: int, records: list[Record], out: Path, *, backend: str = "gloo", **fixed: Any
) -> dict[str, Trained]:
    assert all(record.world_size == world_size for record in records)
    out.mkdir(parents=True, exist_ok=True)
    start_ranks(run_rank, world_size, records, out, backend, fixed, backend=backend)
    return {record.name: Trained(**torch.load(out / f"{record.name}.pt")) for record in records}


class Trainings:
    """Results by the name of their record. Each is trained when it is first asked for, so that one test trains what
    it looks at; the ranks of a world size stay for the next."""

    def __init__(self, records: list[Record], out: Path, **fixed: Any):
        self._records = {record.name: record for record in records}
        assert len(self._records) == len(records), "two records have the same name"
        self._out, self._fixed = out, fixed
        self._groups: dict[int, RankGroup] = {}
        self._trained: dict[str, Trained] = {}

    def __getitem__(self, name: str) -> Trained:
        if name not in self._trained:
            self._trained[name] = self._train(self._records[name])
        return self._trained[name]

    def _train(self, record: Record) -> Trained:
        if record.resume_from is not None:
            record = replace(record, resume_from=self[record.resume_from].checkpoint)
        if record.break_it is not None:  # in ranks of its own: a sabotage stays in its process
            return train_on_ranks(record.world_size, [record], self._out, **self._fixed)[record.name]
        size = record.world_size
        if size not in self._groups:
            self._groups[size] = RankGroup(size, self._out, self._fixed)
        return self._groups[size].train(record)

    def close(self) -> None:
        for group in self._groups.values():
            group.close()


class RankGroup:
    """Ranks that wait for the next record."""

    def __init__(self, world_size: int, out: Path, fixed: dict[str, Any]):
        context = multiprocessing.get_context("forkserver")
        self._out = out
        self._records = [context.SimpleQueue() for _ in range(world_size)]
        self._done = context.SimpleQueue()
        arguments = (self._records, self._done, out, fixed)
        self._ranks = start_ranks(run_waiting_rank, world_size, *arguments, join=False)

    def train(self, record: Record) -> Trained:
        for queue in self._records:
            queue.put(record)
        while self._done.empty():
            assert not self._ranks.join(timeout=0.02), "the ranks have ended"  # raises what one of them raised
        return Trained(**torch.load(self._out / f"{self._done.get()}.pt"))

    def close(self) -> None:
        for queue in self._records:
            queue.put(None)
        while not self._ranks.join():
            pass


def start_ranks(run: Callable[..., None], world_size: int, *args: Any, backend: str = "gloo", join: bool = True) -> Any:
    """`run(rank, world_size, port, *args)` in a process for each rank. Without `join` torch's `ProcessContext`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    if backend == "gloo":
        start_fork_server()
    method = "forkserver" if backend == "gloo" else "spawn"
    return torch.multiprocessing.start_processes(
        run, (world_size, port, *args), nprocs=world_size, join=join, start_method=method
    )


@functools.cache
def start_fork_server() -> None:
    multiprocessing.set_forkserver_preload(
        ["ftray.train.on_ray.worker", "ftray.sweep.fused.worker", "peft", "transformers.models.llama.modeling_llama"]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")  # DeepSpeed reads it when it is imported
        multiprocessing.forkserver.ensure_running()


def run_rank(
    rank: int, world_size: int, port: int, records: list[Record], out: Path, backend: str, fixed: dict[str, Any]
) -> None:
    with joined(rank, world_size, port, backend):
        for record in records:
            run_and_keep(record, rank, out, fixed)


def run_waiting_rank(
    rank: int, world_size: int, port: int, records: list[Any], done: Any, out: Path, fixed: dict[str, Any]
) -> None:
    with joined(rank, world_size, port, "gloo"):
        while (record := records[rank].get()) is not None:
            run_and_keep(record, rank, out, fixed)
            if rank == 0:
                done.put(record.name)


@contextlib.contextmanager
def joined(rank: int, world_size: int, port: int, backend: str) -> Iterator[None]:
    import torch.distributed as dist

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), HF_HUB_OFFLINE="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ["DS_ACCELERATOR"] = "cpu" if backend == "gloo" else "cuda"
    from ftray.model.hardware import make_deterministic

    make_deterministic(num_threads=1)
    dist.init_process_group(backend, rank=rank, world_size=world_size)
    yield
    dist.barrier()
    dist.destroy_process_group()


def run_and_keep(record: Record, rank: int, out: Path, fixed: dict[str, Any]) -> None:
    result = run_record(record, rank, out / f"{record.name}-checkpoints", **fixed)
    if rank == 0:
        torch.save(result, out / f"{record.name}.pt")


def config_of(record: Record, *, base_directory: str, train_file: str) -> Any:
    from ftray.config import parse_config

    text = f"kind: run\nname: parity\nbase_model: {base_directory}\ndata: {{train: {train_file}}}\n"
    sequences = 2 if "objective" in record.settings else 1
    settings = {
        "max_steps": record.steps,
        "batch.examples_per_step": 8,
        "batch.tokens_per_micro_batch": record.tokens_per_micro_batch,
        "data.max_example_tokens": min(2048, record.tokens_per_micro_batch) // sequences,
        "zero.stage": record.stage,
        "workers.count": record.world_size,
        "optimizer.learning_rate": 1e-2,
        "optimizer.warmup_steps": 1,
        "optimizer.weight_decay": 0.1,
        "optimizer.max_grad_norm": 0.5,
        "adapter": "null" if record.full else f"{{rank: 4, alpha: 8, dropout: {record.dropout}}}",
    } | record.settings
    return parse_config(text, [f"{k}={v}" for k, v in settings.items()], kind="run", source="parity")


def run_record(record: Record, rank: int, checkpoints: Path, *, base_directory: str, train_file: str) -> dict[str, Any]:
    from ftray.data.examples import dataset_source
    from ftray.data.sets import training_set
    from ftray.model.base import load_tokenizer, prepare_base
    from ftray.model.chat import ChatRenderer
    from ftray.model.hardware import choose_hardware
    from ftray.objectives import objective_of
    from ftray.train.checkpoints.checkpoint import restore
    from ftray.train.checkpoints.listing import read_state
    from ftray.train.checkpoints.saver import Saver
    from ftray.train.engine.build import make_engine
    from ftray.train.engine.schedule import make_schedule
    from ftray.train.loop import Schedule, Training, evaluator, train
    from ftray.train.loss_guard import LossGuard

    config = config_of(record, base_directory=base_directory, train_file=train_file)
    base = prepare_base(base_directory)
    renderer = ChatRenderer(load_tokenizer(base))
    dataset = training_set(config.data, renderer, shape=objective_of(config.objective).shape)
    torch.manual_seed(12345 + rank)  # what came before must not matter
    engine = make_engine(config, base, choose_hardware(use_gpu=torch.distributed.get_backend() == "nccl"))
    if record.break_it is not None:
        BREAKS[record.break_it](engine)
    start = {name: value.clone() for name, value in engine.weights()}
    start_step = 0
    if record.resume_from is not None:
        restore(Path(record.resume_from), engine)
        start_step = read_state(Path(record.resume_from)).step
    evaluate = evaluator(dataset, engine, token_budget=1024)
    seen = Seen()

    def publish(directory: Path, step: int) -> None:
        shutil.copytree(directory, checkpoints / f"step-{step}", dirs_exist_ok=True)

    def failed(step: int, message: str) -> None:
        raise AssertionError(message)

    saver = Saver(
        engine,
        config,
        base,
        data_digest="digest",
        scratch=checkpoints / "scratch",
        publish=publish,
        upload=lambda directory, step: None,
        on_failure=failed,
    )
    seen.save = saver.begin
    schedule = Schedule(
        start_step,
        record.stop_after or record.steps,
        evaluate_every=2,
        save_every=record.steps,
        learning_rate=make_schedule(config.optimizer, num_steps=record.steps),
    )
    source, budget = dataset_source(config, dataset), config.batch.tokens_per_micro_batch
    training = Training(source, schedule, config.seed, budget, evaluate=evaluate)
    train(engine, training, LossGuard(config.guard), seen)
    saver.finish(last=True)
    saver.close()
    weights = {name: value.clone() for name, value in engine.weights()}
    last = record.stop_after or record.steps
    engine.close()
    return {
        "losses": seen.losses,
        "grad_norms": seen.grad_norms,
        "eval_losses": seen.eval_losses,
        "eval_metrics": seen.eval_metrics,
        "start": start,
        "weights": weights,
        "checkpoint": str(checkpoints / f"step-{last}"),
    }


class Seen:
    """The loop's callbacks: remembers."""

    save: Any

    def __init__(self):
        self.losses: list[float] = []
        self.grad_norms: list[float] = []
        self.eval_losses: list[float] = []
        self.eval_metrics: list[dict[str, float]] = []

    def on_bad_loss(self, step: int, problem: str, rows: list[int]) -> None:
        raise AssertionError(problem)

    def on_step_end(self, record: Any) -> None:
        self.losses.append(record.loss)
        self.grad_norms.append(record.grad_norm)

    def on_evaluated(self, step: int, evaluated: Any) -> None:
        self.eval_losses.append(evaluated.loss)
        self.eval_metrics.append(evaluated.metrics)

    def should_stop(self, step: int) -> bool:
        return False


def normalise_per_micro_batch(engine: Any) -> None:
    """The common mistake: each micro-batch divides by its own count of tokens."""
    from ftray.objectives import Loss

    whole = engine.loss

    def broken(log_probs: Any, row: Any) -> Loss:
        count = row.weights_N.sum()
        return Loss(sum=whole(log_probs, row).sum / count.clamp(min=1) * 10, count=count)

    engine.loss = broken


def forget_world_size(engine: Any) -> None:
    """DeepSpeed's average over ranks is left in the gradients."""
    backward = engine._engine.backward
    engine._engine.backward = lambda loss, **options: backward(loss / engine.world_size, **options)


def neighbours_leak(engine: Any) -> None:
    """The row is one sequence to the attention: examples see those before them."""
    import ftray.model.packed_attention as attention
    from ftray.model.packed_attention import packed_layout

    real = attention.packed_causal_attention

    def leaky(query, key, value, layout, **scores):
        return real(query, key, value, packed_layout([sum(layout.lengths)]), **scores)

    attention.packed_causal_attention = leaky


def forget_moments(engine: Any) -> None:
    """A resume that starts AdamW anew."""
    from ftray.train.engine.state import MASTER, ShardedState

    real = ShardedState.read
    ShardedState.read = lambda self, kind, *where: real(self, kind, *where) * (kind == MASTER)


def restart_positions(engine: Any) -> None:
    """Each rank that shares a row counts its tokens from 0."""
    import ftray.model.packed as packed

    real = packed.share_row

    def broken(*args):
        share = real(*args)
        return dataclasses.replace(share, positions_t=torch.arange(len(share.ids_t)))

    packed.share_row = broken


BREAKS = {
    f.__name__: f
    for f in (normalise_per_micro_batch, forget_world_size, neighbours_leak, forget_moments, restart_positions)
}
