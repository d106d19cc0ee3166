"""The safetensors files of a model directory, read as far as their headers."""

import json
import struct
from pathlib import Path

from ftray.errors import UserError
from ftray.storage import read_json


def weight_files(directory: Path) -> list[Path]:
    """Those that transformers reads: a directory may hold the same weights in another form too."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        return [directory / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    whole = directory / "model.safetensors"
    return [whole] if whole.is_file() else sorted(directory.glob("*.safetensors"))


def weight_shapes(directory: Path) -> dict[str, list[int]]:
    """From the headers of the safetensors files: a length in 8 bytes, then JSON."""
    shapes = {}
    for path in weight_files(directory):
        try:
            with path.open("rb") as file:
                header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        except OSError as error:
            raise UserError(f"base_model: {path} cannot be read: {error.strerror}") from None
        except (struct.error, ValueError):
            raise UserError(f"base_model: {path} is no whole safetensors file; fetch it again") from None
        shapes |= {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
    return shapes
