"""A checkpoint directory: the adapter (or model) as it would be shipped, and what resuming needs besides.

    adapter/ or model/     float32 master weights
    moments.safetensors    AdamW's exp_avg and exp_avg_sq, whole, by parameter name
    trainer.json           step, config, digest of the data
    manifest.json          written last: without it, or with a file that differs, the checkpoint does not exist

State is gathered parameter by parameter and written by rank 0, so any world size and ZeRO stage can resume it.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from ftray.config import RunConfig
from ftray.data.tokens import TokenizedDataset
from ftray.errors import FtrayError
from ftray.model.adapter import WEIGHTS_FILE, parameter_name, write_adapter
from ftray.model.base import BaseModel
from ftray.storage import read_json, verify_directory, write_json, write_manifest

if TYPE_CHECKING:  # importing it loads deepspeed
    from ftray.train.engine import TrainEngine

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class TrainerState:
    step: int  # steps done
    data_digest: str
    world_size: int
    zero_stage: int


def write_checkpoint(
    directory: Path, engine: "TrainEngine", config: RunConfig, base: BaseModel, state: TrainerState, *, rank: int
) -> None:
    """All ranks call it; only rank 0 keeps and writes the tensors."""
    weights = collect(engine.weights(), keep=rank == 0)
    moments = collect(engine.moments(), keep=rank == 0)
    if rank != 0:
        return
    metadata = {"run": config.name, "step": state.step}
    if config.adapter is not None:
        write_adapter(directory / "adapter", weights.items(), config.adapter, base, metadata=metadata)
    else:
        write_model(directory / "model", weights, engine, base, metadata=metadata)
    save_file(moments, directory / "moments.safetensors")
    write_json(directory / "trainer.json", vars(state))
    write_manifest(directory, metadata=metadata)


def collect(tensors: Iterator[tuple[str, Tensor]], *, keep: bool) -> dict[str, Tensor]:
    """Goes through all of them, since each is a collective; a copy only where it is wanted."""
    kept = {}
    for name, tensor in tensors:
        if keep:
            kept[name] = tensor.detach().to("cpu", copy=True).contiguous()
    return kept


def write_model(
    directory: Path, weights: dict[str, Tensor], engine: "TrainEngine", base: BaseModel, *, metadata: dict
) -> None:
    """A Hugging Face directory: `ftray serve` hosts it as a base, transformers loads it."""
    directory.mkdir(parents=True, exist_ok=True)
    engine.model.model.config.save_pretrained(directory)
    for path in sorted(base.directory.iterdir()):
        if path.name.startswith(
            ("tokenizer", "chat_template", "special_tokens", "generation_config", "vocab", "merges")
        ):
            shutil.copyfile(path, directory / path.name)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    write_manifest(directory, metadata={**metadata, "base_model": base.name, "base_fingerprint": base.fingerprint})


def restore(directory: Path, engine: "TrainEngine") -> None:
    state = read_state(directory)
    if (directory / "adapter").is_dir():
        saved = load_file(directory / "adapter" / WEIGHTS_FILE)
        weights = {parameter_name(key): value for key, value in saved.items()}
    else:
        weights = load_file(directory / "model" / "model.safetensors")
    engine.restore(weights, load_file(directory / "moments.safetensors"), step=state.step)


def read_state(directory: Path) -> TrainerState:
    return TrainerState(**read_json(directory / "trainer.json"))


def newest_whole_checkpoint(run_directory: Path) -> Path | None:
    """The latest checkpoint whose manifest proves it; damaged ones are passed over."""
    found = [path for path in (run_directory / CHECKPOINTS).glob("step-*") if path.name[5:].isdigit()]
    for path in sorted(found, key=lambda path: int(path.name[5:]), reverse=True):
        try:
            verify_directory(path)
        except FtrayError:
            continue
        return path
    return None


def data_digest(dataset: TokenizedDataset) -> str:
    digest = hashlib.sha256()
    for array in (dataset.ids, dataset.trained, dataset.offsets):
        digest.update(array.tobytes())
    return digest.hexdigest()


def config_digest(config: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]
