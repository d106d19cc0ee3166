"""Is there room for the checkpoints that a run keeps?"""

import math
import shutil
from pathlib import Path

from ftray.config.run import RunConfig
from ftray.errors import UserError
from ftray.model.base import BaseModel
from ftray.model.weight_files import weight_files, weight_shapes
from ftray.storage.local_copies import describe_bytes

STATE_BYTES = 12  # of a trained weight in a checkpoint: float32 master and two moments


def check_disk(config: RunConfig, base: BaseModel, run_directory: Path) -> None:
    """Room for the checkpoints that are kept, the one being written, and the result; raises `UserError`."""
    state = checkpoint_bytes(config, base)
    there = sum(1 for _ in (run_directory / "checkpoints").glob("step-*"))
    artifact = sum(path.stat().st_size for path in weight_files(base.directory)) if config.adapter is None else state
    need = state * max(1, config.checkpoint.keep + 1 - there) + artifact
    free = shutil.disk_usage(run_directory).free
    if free < need:
        raise UserError(
            f"runs_dir: {run_directory} has {describe_bytes(free)} free; {config.checkpoint.keep} checkpoints of "
            f"{describe_bytes(state)}, one more while it is written, and the result need {describe_bytes(need)}: make "
            "room, lower checkpoint.keep, or choose another runs_dir"
        )


def checkpoint_bytes(config: RunConfig, base: BaseModel) -> int:
    """Of one checkpoint, from the shapes in the base model's files; for LoRA as if every matrix got an adapter."""
    shapes = weight_shapes(base.directory)
    if config.adapter is None:
        return STATE_BYTES * sum(math.prod(shape) for shape in shapes.values())
    rank = max([config.adapter.rank, *config.adapter.rank_pattern.values()])
    whole = [
        math.prod(shape)
        for name, shape in shapes.items()
        if any(f".{saved}." in f".{name}" for saved in config.adapter.modules_to_save)
    ]
    adapters = [rank * sum(shape) for shape in shapes.values() if len(shape) == 2]
    return STATE_BYTES * (sum(whole) + sum(adapters))
