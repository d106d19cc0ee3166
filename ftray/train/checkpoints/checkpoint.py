"""A checkpoint directory: what resuming needs, and the adapter as it would be shipped.

    state/rank-R.safetensors   float32 master weights and AdamW's moments, each rank its own ranges (engine/state.py)
    adapter/                   for LoRA: a PEFT directory
    trainer.json               step, digest of the data, world size and stage
    manifest.json              written last: without it, or with a file that differs, the checkpoint does not exist

Nothing in it depends on the world size or ZeRO stage, so any resumes any other.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ftray.config import RunConfig
from ftray.model.adapters.lora import write_adapter
from ftray.model.base import BaseModel
from ftray.model.heads import head_of
from ftray.objectives import objective_of
from ftray.storage import FileEntry, list_files, write_json, write_manifest
from ftray.train.checkpoints.listing import ADAPTER, TRAINER_STATE, TrainerState, read_state
from ftray.train.engine.protocol import TrainingEngine
from ftray.train.engine.state import Shard, ShardedState, write_shard


@dataclass(frozen=True)
class Snapshot:
    """The state after a step, copied: training goes on while it is written."""

    state: TrainerState
    shard: Shard
    adapter: dict[str, Tensor] | None  # on rank 0, for LoRA
    initial_adapter: dict[str, Tensor] | None  # PiSSA's
    ties_embeddings: bool
    adapter_options: dict[str, Any] = field(default_factory=dict)  # what `options_of` says


def take_snapshot(engine: TrainingEngine, config: RunConfig, state: TrainerState, *, rank: int) -> Snapshot:
    """All ranks call it: the adapter, which is small, is gathered; the rest is each rank's own."""
    adapter = collect(engine.weights(), keep=rank == 0) if config.adapter is not None else None
    return Snapshot(
        state, engine.shard(), adapter, engine.initial_adapter, engine.ties_embeddings, engine.adapter_options
    )


def collect(tensors: Iterator[tuple[str, Tensor]], *, keep: bool) -> dict[str, Tensor] | None:
    """Goes through all of them, since each is a collective; a copy only where it is wanted."""
    kept = {}
    for name, tensor in tensors:
        if keep:
            kept[name] = tensor.detach().to("cpu", copy=True).contiguous()
    return kept if keep else None


def write_snapshot(
    directory: Path, snapshot: Snapshot, config: RunConfig, base: BaseModel, *, rank: int
) -> list[FileEntry]:
    """This rank's files, with size and hash. No communication: it may run beside the training."""
    directory.mkdir(parents=True, exist_ok=True)
    write_shard(directory, snapshot.shard, rank=rank)
    if rank != 0:
        return list_files(directory)
    if snapshot.adapter is not None and config.adapter is not None:
        metadata = metadata_of(config, snapshot.state)
        write_adapter(
            directory / ADAPTER,
            snapshot.adapter,
            config.adapter,
            base,
            metadata=metadata,
            head=head_of(objective_of(config.objective).head),
            initial=snapshot.initial_adapter,
            ties_embeddings=snapshot.ties_embeddings,
            options=snapshot.adapter_options,
        )
    write_json(directory / TRAINER_STATE, vars(snapshot.state))
    return list_files(directory)


def complete_checkpoint(directory: Path, files: list[FileEntry], config: RunConfig, state: TrainerState) -> None:
    """Rank 0, with the files of all ranks: from here on the checkpoint counts."""
    write_manifest(directory, metadata=metadata_of(config, state), files=files)


def metadata_of(config: RunConfig, state: TrainerState) -> dict[str, Any]:
    return {"run": config.name, "step": state.step}


def restore(directory: Path, engine: TrainingEngine) -> None:
    engine.restore(ShardedState(directory), step=read_state(directory).step)
