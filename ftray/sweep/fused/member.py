"""One run of a fused group: what it alone owns, and the directory that it leaves, as an ordinary run would."""

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ftray.config import RunConfig
from ftray.data.dataset import TokenizedDataset
from ftray.data.examples import ExampleSource, dataset_source
from ftray.model.base import BaseModel
from ftray.train.checkpoints.checkpoint import Snapshot, complete_checkpoint, write_snapshot
from ftray.train.checkpoints.listing import CHECKPOINTS, TrainerState, list_checkpoints, read_state
from ftray.train.engine.optimizer import make_optimizer
from ftray.train.engine.schedule import make_schedule
from ftray.train.engine.state import MASTER, MOMENTS, Shard, ShardedState
from ftray.train.loss_guard import LossGuard
from ftray.train.runs.uri import local_directory

if TYPE_CHECKING:
    from ftray.train.hooks.recorder import Recorder  # it imports ray


@dataclass
class Member:
    config: RunConfig
    parameters: dict[str, nn.Parameter]
    source: ExampleSource
    optimizer: torch.optim.Optimizer
    learning_rate: Callable[[int], float]
    guard: LossGuard
    step: int = 0  # done
    recorder: "Recorder | None" = field(default=None, repr=False)  # on rank 0

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def directory(self) -> Path:
        return local_directory(self.config.runs_dir, self.config.name)

    @property
    def num_steps(self) -> int:
        return self.source.num_steps

    @property
    def is_done(self) -> bool:
        return self.step == self.num_steps

    @property
    def is_evaluated(self) -> bool:
        """At this step, as the loop of a run of its own would."""
        return self.is_done or self.step % self.config.evaluation.every == 0

    @property
    def is_saved(self) -> bool:
        return self.is_done or self.step % self.config.checkpoint.every == 0

    def update(self) -> float:
        """Clips, and makes one AdamW update from the gradients that lie there; returns their norm before clipping. None
        is made where that is no number."""
        norm = float(nn.utils.clip_grad_norm_(list(self.parameters.values()), self.config.optimizer.max_grad_norm))
        if not math.isfinite(norm):
            return norm
        rate = self.learning_rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["rate_factor"]
        self.optimizer.step()
        self.step += 1
        return norm


def make_member(
    config: RunConfig,
    parameters: dict[str, nn.Parameter],
    dataset: TokenizedDataset,
    *,
    checkpoint: Path | None = None,
    earlier_losses: Sequence[float] = (),
) -> Member:
    """At its checkpoint, with the losses of the steps before it, or at the start."""
    source = dataset_source(config, dataset)
    member = Member(
        config=config,
        parameters=parameters,
        source=source,
        optimizer=make_optimizer(parameters, config.optimizer),
        learning_rate=make_schedule(config.optimizer, num_steps=source.num_steps),
        guard=LossGuard(config.guard, earlier_losses=earlier_losses),
    )
    if checkpoint is not None:
        restore(member, checkpoint)
    return member


# -- checkpoints, in the format of any other run: `ftray train` could go on from them ------------------------------


def save(member: Member, base: BaseModel, *, data_digest: str) -> None:
    """On one rank: adapters and their moments are whole on each."""
    state = TrainerState(member.step, data_digest, world_size=1, zero_stage=member.config.zero.stage)
    adapter = {name: copied(parameter) for name, parameter in member.parameters.items()}
    snapshot = Snapshot(state, shard_of(member), adapter, initial_adapter=None, ties_embeddings=False)
    directory = member.directory / CHECKPOINTS / f"step-{member.step}"
    shutil.rmtree(directory, ignore_errors=True)
    files = write_snapshot(directory, snapshot, member.config, base, rank=0)
    complete_checkpoint(directory, files, member.config, state)
    for old in list_checkpoints(member.directory)[member.config.checkpoint.keep :]:
        shutil.rmtree(old)


def shard_of(member: Member) -> Shard:
    tensors: dict[str, Tensor] = {}
    for name, parameter in member.parameters.items():
        tensors[f"{MASTER}.{name}"] = copied(parameter).flatten()
        for kind in MOMENTS:
            tensors[f"{kind}.{name}"] = copied(member.optimizer.state[parameter][kind]).flatten()
    shapes = {name: list(parameter.shape) for name, parameter in member.parameters.items()}
    return Shard(tensors, dict.fromkeys(shapes, 0), shapes)


def restore(member: Member, checkpoint: Path) -> None:
    saved = ShardedState(checkpoint)
    member.step = read_state(checkpoint).step
    with torch.no_grad():
        for name, parameter in member.parameters.items():
            parameter.copy_(saved.whole(MASTER, name))
            moments: dict[str, Any] = {kind: saved.whole(kind, name).to(parameter.device) for kind in MOMENTS}
            member.optimizer.state[parameter] = {"step": torch.tensor(float(member.step)), **moments}


def copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
