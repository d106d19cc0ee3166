"""Training state on disk. Every rank writes the ranges it owns; a rank of any later world size reads those it needs.

    state/rank-00000.safetensors    "master.NAME", "exp_avg.NAME", "exp_avg_sq.NAME": float32, flat; the header says
                                    where each range starts in its flattened parameter

So nothing is ever gathered: a rank holds its own share while it writes, and one parameter at most while it reads.
ZeRO stages 0 to 3 cut parameters in different places, and each finds its ranges in the files of any other.
"""

import json
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ftray.errors import FtrayError
from ftray.storage import read_manifest

STATE = "state"
MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")
BLOCKS = "blocks"


@dataclass(frozen=True)
class Shard:
    """One rank's share of the state, on the CPU."""

    tensors: dict[str, Tensor]  # "KIND.NAME" -> [n] float32
    starts: dict[str, int]  # NAME -> first element of the range
    shapes: dict[str, list[int]]  # NAME -> shape of the whole parameter
    blocks: dict[str, Tensor] = field(default_factory=dict)  # constants of 8-bit moments: of this layout alone
    layout: str = ""  # world size, stage and rank


def write_shard(directory: Path, shard: Shard, *, rank: int) -> None:
    (directory / STATE).mkdir(parents=True, exist_ok=True)
    header = {"starts": json.dumps(shard.starts), "shapes": json.dumps(shard.shapes), "layout": shard.layout}
    tensors = shard.tensors | {f"{BLOCKS}.{name}": value for name, value in shard.blocks.items()}
    save_file(tensors, directory / STATE / f"rank-{rank:05}.safetensors", metadata=header)


class ShardedState:
    """Reads ranges from the files of all ranks, without loading more than is asked for.

    Only files of the manifest count: a step saved again by fewer ranks may lie beside files of the earlier save.
    """

    def __init__(self, checkpoint: Path):
        self._directory = checkpoint / STATE
        self._pieces: dict[str, list[tuple[int, Any]]] = {}  # NAME -> [(start, open file)]
        self._by_layout: dict[str, Any] = {}  # open files
        self.shapes: dict[str, list[int]] = {}
        listed = [entry.path for entry in read_manifest(checkpoint).files if entry.path.startswith(f"{STATE}/rank-")]
        for path in sorted(listed):
            file: Any = safe_open(checkpoint / path, framework="pt")
            header = file.metadata()
            self.shapes |= json.loads(header["shapes"])
            self._by_layout[header.get("layout", "")] = file
            for name, start in json.loads(header["starts"]).items():
                self._pieces.setdefault(name, []).append((start, file))

    def blocks(self, layout: str) -> dict[str, Tensor]:
        """Constants of 8-bit moments as a rank of exactly this layout wrote them, else nothing."""
        file = self._by_layout.get(layout)
        if file is None:
            return {}
        names = [name for name in file.keys() if name.startswith(f"{BLOCKS}.")]  # noqa: SIM118  a file, no dict
        return {name.removeprefix(f"{BLOCKS}."): file.get_tensor(name) for name in names}

    def read(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        """[stop - start] float32. Raises `FtrayError` when the files do not cover the range."""
        out = torch.empty(stop - start)
        covered = 0
        for piece_start, file in self._pieces.get(name, []):
            piece = file.get_slice(f"{kind}.{name}")
            low, high = max(start, piece_start), min(stop, piece_start + piece.get_shape()[0])
            if low < high:
                out[low - start : high - start] = piece[low - piece_start : high - piece_start]
                covered += high - low
        if covered != stop - start:
            raise FtrayError(f"{self._directory}: holds {covered} of {stop - start} elements of {kind}.{name}")
        return out

    def whole(self, kind: str, name: str) -> Tensor:
        """One parameter in its own shape."""
        shape = self.shapes.get(name)
        if shape is None:
            raise FtrayError(f"{self._directory}: has no parameter {name}; the checkpoint is of another model")
        return self.read(kind, name, 0, prod(shape)).view(shape)
