"""Adapters read back from their PEFT directories and checked for serving."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ftray.errors import AdapterError
from ftray.model.adapters.directory import PREFIX, WEIGHTS_FILE, check_plain_lora, lora_scale, read_adapter_config
from ftray.model.adapters.experts import EXPERTS, NESTED


@dataclass(frozen=True)
class LoraWeights:
    """One target module's update: scale * B A x. A: [rank, in], B: [out, rank]; of experts all at once, as PEFT keeps
    them (`experts.py`)."""

    a: Tensor
    b: Tensor
    scale: float
    rank: int


@dataclass(frozen=True)
class Adapter:
    modules: dict[str, LoraWeights]  # by module name in the base model
    num_bytes: int
    target_parameters: tuple[str, ...] = ()  # of experts

    @property
    def linear(self) -> dict[str, LoraWeights]:
        """Of all but experts."""
        return {name: own for name, own in self.modules.items() if own.rank == own.a.shape[0]}

    @property
    def max_rank(self) -> int:
        return max(module.rank for module in self.modules.values())


def read_adapter(directory: Path, *, label: str) -> Adapter:
    """Reads a PEFT LoRA directory without peft. Raises `AdapterError` saying what is wrong with it."""
    config = read_adapter_config(directory, label=label)
    check_plain_lora(config, label=label)
    tensors = read_tensors(directory, label=label)
    modules: dict[str, LoraWeights] = {}
    parameters = tuple(config.get("target_parameters") or ())
    if parameters and (config.get("rank_pattern") or config.get("alpha_pattern")):
        raise AdapterError(
            f"{label}: patterns of ranks beside target_parameters are not served; merge it into its base"
        )
    for key in sorted(key for key in tensors if ".lora_A." in key):
        name = key.removeprefix(PREFIX).split(".lora_A.")[0]
        a, b = tensors.pop(key), tensors.pop(key.replace(".lora_A.", ".lora_B."), None)
        of_experts = bool(parameters) and name.replace(NESTED, "").endswith(EXPERTS)
        modules[name] = lora_weights(a, b, config, name, label=label, rank=config.get("r") if of_experts else None)
    if tensors or not modules:
        unknown = next(iter(tensors), "no LoRA weights at all")
        raise AdapterError(f"{label}: {WEIGHTS_FILE} holds {unknown}, which is no LoRA weight; merge it into its base")
    num_bytes = sum(4 * (m.a.numel() + m.b.numel()) for m in modules.values())
    return Adapter(modules, num_bytes, parameters)


def read_tensors(directory: Path, *, label: str) -> dict[str, Tensor]:
    try:
        # From bytes: `load_file` of safetensors 0.8 keeps 60 bytes of every tensor for ever, and replicas load all day.
        return load((directory / WEIGHTS_FILE).read_bytes())
    except FileNotFoundError:
        raise AdapterError(f"{label}: {directory} has no {WEIGHTS_FILE}; publish a PEFT directory") from None
    except SafetensorError as error:
        raise AdapterError(f"{label}: {WEIGHTS_FILE} is corrupt ({error}); publish the adapter again") from None


def lora_weights(
    a: Tensor, b: Tensor | None, config: dict[str, Any], name: str, *, label: str, rank: int | None = None
) -> LoraWeights:
    """Of one module: A [rank, in] and B [out, rank] in float32, with the scale that its config gives. `rank`: of one
    expert, where they are experts."""
    rank = a.shape[0] if rank is None else rank
    if b is None or a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or (rank and a.shape[0] % rank):
        raise AdapterError(f"{label}: {name}: lora_A and lora_B do not fit together; publish the adapter again")
    a, b = a.float(), b.float()
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise AdapterError(f"{label}: {name}: holds NaN or infinity; the run that made it diverged")
    try:
        scale = lora_scale(config, name, rank)
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError, re.error) as error:
        raise AdapterError(f"{label}: {name}: no scale from lora_alpha and rank {rank} ({error!r})") from None
    if not math.isfinite(scale):
        raise AdapterError(f"{label}: {name}: lora_alpha makes the scale {scale}; publish the adapter again")
    return LoraWeights(a, b, scale, rank)


def check_rank(adapter: Adapter, limit: int, *, label: str) -> None:
    if adapter.max_rank > limit:
        raise AdapterError(f"{label}: rank {adapter.max_rank} is over this endpoint's adapters.max_rank ({limit})")


def check_shapes(modules: Mapping[str, LoraWeights], shapes: Mapping[str, tuple[int, int]], *, label: str) -> None:
    """`shapes`: (in, out) of the base model's linear layers by name."""
    for name, module in modules.items():
        if name not in shapes:
            raise AdapterError(f"{label}: targets {name}, which the base model does not have; publish it for this base")
        want, have = shapes[name], (module.a.shape[1], module.b.shape[0])
        if want != have:
            raise AdapterError(
                f"{label}: {name} maps {have[0]} to {have[1]}, the base model's maps {want[0]} to {want[1]}"
            )
