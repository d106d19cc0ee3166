"""From a checkpoint's sharded state to the Hugging Face directory of a fully fine-tuned model.

It streams: one parameter is read at a time, and written in files of a few GiB, so a model of any size passes through
a small driver. `ftray serve` hosts the result as a base, transformers loads it.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ftray.model.base import BaseModel, keep_template
from ftray.storage import read_json, write_json, write_manifest
from ftray.train.engine.state import MASTER, ShardedState

MAX_FILE_BYTES = 4 * 2**30
# Of the base model's directory: everything but its weights and what describes their files.
COPIED = ("tokenizer", "chat_template", "special_tokens", "added_tokens", "generation_config", "vocab", "merges")


def export_model(checkpoint: Path, directory: Path, base: BaseModel, *, metadata: dict) -> None:
    """Writes config, tokenizer and weights, in the base model's dtype, with a manifest."""
    directory.mkdir(parents=True, exist_ok=True)
    for path in sorted(base.directory.iterdir()):
        if path.name.startswith(COPIED):
            shutil.copyfile(path, directory / path.name)
    config = read_json(base.directory / "config.json")
    write_json(directory / "config.json", config)
    dtype = getattr(torch, config.get("dtype") or config.get("torch_dtype") or "float32")
    write_weights(ShardedState(checkpoint), directory, dtype=dtype)
    keep_template(base, directory)
    write_manifest(directory, metadata={**metadata, **base.described})


def write_weights(saved: ShardedState, directory: Path, *, dtype: torch.dtype) -> None:
    groups = list(grouped(saved, bytes_per_element=dtype.itemsize))
    file_of: dict[str, str] = {}
    for number, names in enumerate(groups, start=1):
        file = "model.safetensors" if len(groups) == 1 else f"model-{number:05}-of-{len(groups):05}.safetensors"
        tensors: dict[str, Tensor] = {name: saved.whole(MASTER, name).to(dtype) for name in names}
        save_file(tensors, directory / file, metadata={"format": "pt"})
        file_of |= dict.fromkeys(names, file)
    if len(groups) > 1:
        total = sum(torch.Size(shape).numel() for shape in saved.shapes.values()) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": file_of}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))


def grouped(saved: ShardedState, *, bytes_per_element: int):
    """Names of the parameters of each file."""
    names: list[str] = []
    num_bytes = 0
    for name, shape in sorted(saved.shapes.items()):
        size = torch.Size(shape).numel() * bytes_per_element
        if names and num_bytes + size > MAX_FILE_BYTES:
            yield names
            names, num_bytes = [], 0
        names.append(name)
        num_bytes += size
    yield names
