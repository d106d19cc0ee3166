"""What a model is, as far as its size goes, and where its config.json is had from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftray.errors import UserError
from ftray.model.base import EMBEDDED, is_hub_id, prepare_base
from ftray.model.flops import ModelFlops
from ftray.storage import read_json

SHAPES = Path(__file__).parent / "shapes"  # config.json of well-known models, as far as sizes go: ORG--NAME.json
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # a weight, its share of a block's constant, and of that constant's own


@dataclass(frozen=True)
class ModelSize:
    """Numbers of elements, and what a forward pass keeps for its backward in bytes."""

    frozen: int
    trained: int
    layer: int  # the largest decoder layer's
    quantized: int  # of the frozen ones, in 4 bits
    num_layers: int
    hidden: int
    vocabulary: int
    layer_bytes_per_token: float  # kept by one decoder layer
    layer_bytes: float  # kept by it whatever the number of tokens (DoRA's norms)
    outer_bytes_per_token: float  # kept by what is around the layers
    widest_bytes_per_token: float  # the widest activation of a layer
    flops: ModelFlops

    @property
    def total(self) -> int:
        return self.frozen + self.trained


def read_model_config(name: str) -> dict[str, Any]:
    """Its config.json: of a directory, the embedded model, the hub's cache, a shipped shape, or the hub."""
    if name in EMBEDDED or Path(name).exists() or not is_hub_id(name):
        return read_json(prepare_base(name).directory / "config.json")
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, _, revision = name.partition("@")
    cached = try_to_load_from_cache(repository, "config.json", revision=revision or None)
    if isinstance(cached, str):
        return read_json(Path(cached))
    shape = SHAPES / f"{repository.replace('/', '--')}.json"
    if shape.is_file():
        return read_json(shape)
    try:
        return read_json(Path(hf_hub_download(repository, "config.json", revision=revision or None)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"base_model: {name}: its config.json is not to be had: {str(error).splitlines()[0]}") from None


def frozen_bytes(size: ModelSize, *, bytes_per_weight: int) -> float:
    return size.quantized * NF4_BYTES + (size.frozen - size.quantized) * bytes_per_weight
