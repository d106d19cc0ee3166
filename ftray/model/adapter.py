"""Adapters as plain PEFT directories: read back and checked for serving. (lora.py trains and writes them.)"""

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

from ftray.errors import AdapterError, UserError
from ftray.model.base import BaseModel
from ftray.storage import local_copies, read_json
from ftray.storage.cache import cache_directory

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
# PEFT options that change the maths beyond W x + scale * B A x; the engine refuses an adapter that has one set.
UNSUPPORTED_OPTIONS = {
    "use_dora": False,
    "modules_to_save": None,
    "bias": "none",
    "layer_replication": None,
    "use_qalora": False,
    "alora_invocation_tokens": None,
}
# Python's `re` tries every way to match and lets no other thread run: a config's patterns repeat no group, and
# few other things.
REPEAT, REPEATED_GROUP, MOST_REPEATS = re.compile(r"[*+{]"), re.compile(r"\)[*+{]"), 3
# PEFT changes the base's weights when it loads an adapter that says so.
BASE_CHANGING_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")

# Beside the directory of an adapter that lies where its run left it: its lineage.
NOTES_OF_ITS_RUN = ("config.json", "environment.json", "result.json")


@dataclass(frozen=True)
class LoraWeights:
    """One target module's update: scale * B A x. A: [rank, in], B: [out, rank]."""

    a: Tensor
    b: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True)
class Adapter:
    modules: dict[str, LoraWeights]  # by module name in the base model
    num_bytes: int

    @property
    def max_rank(self) -> int:
        return max(module.rank for module in self.modules.values())


def local_adapter(uri: str | Path) -> Path | None:
    """A PEFT directory on this machine; of a URL (s3://...) a copy, with the notes of its run beside it. None: it is no
    directory. Raises `UserError` where the store has nothing of that name."""
    if "://" not in str(uri):
        return Path(uri) if Path(uri).is_dir() else None
    parent, _, name = str(uri).rstrip("/").rpartition("/")
    copies = local_copies(cache_directory())
    directory = copies.fetch(parent, wanted=lambda key: key.startswith(f"{name}/") or key in NOTES_OF_ITS_RUN) / name
    if not directory.is_dir():
        raise UserError(f"{uri}: there is nothing of that name in the store")
    return directory


def read_adapter(directory: Path, *, label: str) -> Adapter:
    """Reads a PEFT LoRA directory without peft. Raises `AdapterError` saying what is wrong with it."""
    config = read_adapter_config(directory, label=label)
    for option, neutral in UNSUPPORTED_OPTIONS.items():
        if config.get(option) not in (neutral, None, False):
            raise AdapterError(
                f"{label}: {option}={config[option]!r} cannot be served as an adapter; merge it into its base"
            )
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(BASE_CHANGING_STARTS):
        raise AdapterError(
            f"{label}: init_lora_weights={start!r} changes its base; save it as a plain LoRA (PEFT's save_pretrained "
            "with path_initial_model_for_weight_conversion)"
        )
    try:
        # From bytes: `load_file` of safetensors 0.8 keeps 60 bytes of every tensor for ever, and replicas load all day.
        tensors = load((directory / WEIGHTS_FILE).read_bytes())
    except FileNotFoundError:
        raise AdapterError(f"{label}: {directory} has no {WEIGHTS_FILE}; publish a PEFT directory") from None
    except SafetensorError as error:
        raise AdapterError(f"{label}: {WEIGHTS_FILE} is corrupt ({error}); publish the adapter again") from None
    modules: dict[str, LoraWeights] = {}
    for key in sorted(key for key in tensors if ".lora_A." in key):
        name = key.removeprefix(PREFIX).split(".lora_A.")[0]
        a, b = tensors.pop(key), tensors.pop(key.replace(".lora_A.", ".lora_B."), None)
        if b is None or a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
            raise AdapterError(f"{label}: {name}: lora_A and lora_B do not fit together; publish the adapter again")
        a, b = a.float(), b.float()
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise AdapterError(f"{label}: {name}: holds NaN or infinity; the run that made it diverged")
        try:
            scale = lora_scale(config, name, a.shape[0])
        except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError, re.error) as error:
            raise AdapterError(f"{label}: {name}: no scale from lora_alpha and rank {a.shape[0]} ({error!r})") from None
        if not math.isfinite(scale):
            raise AdapterError(f"{label}: {name}: lora_alpha makes the scale {scale}; publish the adapter again")
        modules[name] = LoraWeights(a, b, scale)
    if tensors or not modules:
        unknown = next(iter(tensors), "no LoRA weights at all")
        raise AdapterError(f"{label}: {WEIGHTS_FILE} holds {unknown}, which is no LoRA weight; merge it into its base")
    num_bytes = sum(4 * (m.a.numel() + m.b.numel()) for m in modules.values())
    return Adapter(modules, num_bytes)


def check_base(key: str, metadata: Mapping[str, Any], base: BaseModel, *, here: str = "this endpoint serves") -> None:
    """Refuses an adapter of another base, naming both. A foreign PEFT directory may carry no fingerprint."""
    fingerprint = metadata.get("base_fingerprint")
    if fingerprint is not None and fingerprint != base.fingerprint:
        raise AdapterError(
            f"{key}: trained on {metadata.get('base_model')} ({fingerprint[:12]}), {here} {base}; "
            "publish an adapter trained on this base"
        )


def check_rank(adapter: Adapter, limit: int, *, label: str) -> None:
    if adapter.max_rank > limit:
        raise AdapterError(f"{label}: rank {adapter.max_rank} is over this endpoint's adapters.max_rank ({limit})")


def check_shapes(adapter: Adapter, shapes: Mapping[str, tuple[int, int]], *, label: str) -> None:
    """`shapes`: (in, out) of the base model's linear layers by name."""
    for name, module in adapter.modules.items():
        if name not in shapes:
            raise AdapterError(f"{label}: targets {name}, which the base model does not have; publish it for this base")
        want, have = shapes[name], (module.a.shape[1], module.b.shape[0])
        if want != have:
            raise AdapterError(
                f"{label}: {name} maps {have[0]} to {have[1]}, the base model's maps {want[0]} to {want[1]}"
            )


def read_adapter_config(directory: Path, *, label: str) -> dict[str, Any]:
    try:
        config = read_json(directory / CONFIG_FILE)
    except FileNotFoundError:
        raise AdapterError(f"{label}: {directory} has no {CONFIG_FILE}; it is no PEFT adapter directory") from None
    except (ValueError, RecursionError):  # no JSON, no UTF-8, or nested without end
        raise AdapterError(f"{label}: {CONFIG_FILE} is not JSON; the file is damaged") from None
    if not isinstance(config, dict):
        raise AdapterError(f"{label}: {CONFIG_FILE} is no JSON object; publish a PEFT directory")
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{label}: peft_type is {config.get('peft_type')!r}; only LORA is served")
    return config


def lora_scale(config: dict[str, Any], module: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023, arXiv 2312.03732)."""
    alpha = pattern_value(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


def pattern_value(patterns: dict[str, float], module: str, default: float) -> float:
    """PEFT's per-module override: the first key, a regular expression, that matches the module's name or its ending.
    Raises ValueError for one that could take for ever."""
    for key in patterns:
        if REPEATED_GROUP.search(key) or len(REPEAT.findall(key)) > MOST_REPEATS:
            raise ValueError(f"the pattern {key[:80]!r} repeats a group, or more than {MOST_REPEATS} things")
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)
