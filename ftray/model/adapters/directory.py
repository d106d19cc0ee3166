"""An adapter as a plain PEFT directory: where it is, what its config says. Without torch, which drivers do without."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ftray.errors import AdapterError, DamagedError, UserError
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
    "trainable_token_indices": None,
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


def read_adapter_config(directory: Path, *, label: str) -> dict[str, Any]:
    try:
        config = read_json(directory / CONFIG_FILE)
    except FileNotFoundError:
        raise AdapterError(f"{label}: {directory} has no {CONFIG_FILE}; it is no PEFT adapter directory") from None
    except DamagedError:  # no JSON, no UTF-8, or nested without end
        raise AdapterError(f"{label}: {CONFIG_FILE} is not JSON; the file is damaged") from None
    if not isinstance(config, dict):
        raise AdapterError(f"{label}: {CONFIG_FILE} is no JSON object; publish a PEFT directory")
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{label}: peft_type is {config.get('peft_type')!r}; only LORA is served")
    return config


def check_plain_lora(config: Mapping[str, Any], *, label: str) -> None:
    """Refuses what is more than W x + scale * B A x."""
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


def check_base(key: str, metadata: Mapping[str, Any], base: BaseModel, *, here: str = "this endpoint serves") -> None:
    """Refuses an adapter of another base, naming both. A foreign PEFT directory may carry no fingerprint."""
    fingerprint = metadata.get("base_fingerprint")
    if fingerprint is not None and fingerprint != base.fingerprint:
        raise AdapterError(
            f"{key}: trained on {metadata.get('base_model')} ({fingerprint[:12]}), {here} {base}; "
            "publish an adapter trained on this base"
        )


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
