"""Which kinds of decoder layers ftray computes, a module for each. A base with any other is refused: it would be
computed wrongly without a word.

A new kind is a module with a `LayerKind` and a line in KINDS, under its name in a config.json's `layer_types`.
"""

from collections.abc import Callable
from typing import Any

from ftray.errors import UserError
from ftray.model.base import BaseModel
from ftray.model.families.full_attention import FullAttention, make_full_attention
from ftray.model.families.protocol import CacheSpec, FullSpec, LayerKind
from ftray.storage import read_json

FULL = "full_attention"
KINDS: dict[str, Callable[[Any], LayerKind]] = {FULL: make_full_attention}


def layer_kinds(config: Any) -> tuple[LayerKind, ...]:
    """Of each layer in its order. `config`: transformers' config of the text model."""
    names = getattr(config, "layer_types", None) or [FULL] * config.num_hidden_layers
    made = {name: KINDS[name](config) for name in {*names}}
    return tuple(made[name] for name in names)


def check_layers(base: BaseModel) -> None:
    """Raises `UserError` for what ftray does not compute: the kind of a layer, or what comes around it."""
    check_config(read_json(base.directory / "config.json"), name=base.name)


def check_config(config: dict[str, Any], *, name: str) -> None:
    """`config`: of a config.json."""
    config = config.get("text_config", config)
    layers = config.get("layer_types") or []
    sliding = config.get("sliding_window") is not None and config.get("use_sliding_window", True)
    found = {kind.replace("_", " "): True for kind in layers if kind not in KINDS} | {
        "sliding-window attention": not layers and sliding,
        "attention logit soft-capping": config.get("attn_logit_softcapping") is not None,
        "final logit soft-capping": config.get("final_logit_softcapping") is not None,
        "scaled logits": any(config.get(key) not in (None, 1, 1.0) for key in ("logits_scaling", "logit_scale")),
        "attention sinks": config.get("model_type") == "gpt_oss",
    }
    for what, present in found.items():
        if present:
            raise UserError(f"base_model: {name} uses {what}, which ftray does not compute yet; choose another base")


__all__ = [
    "KINDS",
    "CacheSpec",
    "FullAttention",
    "FullSpec",
    "LayerKind",
    "check_config",
    "check_layers",
    "layer_kinds",
]
