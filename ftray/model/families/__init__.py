"""Which kinds of decoder layers ftray computes. A base with any other is refused: it would be computed wrongly without
a word.

A new kind is a module with a `LayerKind` and a line in KINDS, under its name in a config's `layer_types`.
"""

from collections.abc import Callable
from typing import Any

from ftray.errors import UserError
from ftray.model.base import BaseModel, text_config
from ftray.model.families.attention import (
    ChunkedAttention,
    FullAttention,
    SlidingAttention,
    make_chunked_attention,
    make_full_attention,
    make_sliding_attention,
)
from ftray.model.families.protocol import LayerKind

FULL, SLIDING = "full_attention", "sliding_attention"
# Layers that keep a state (`recurrent.py`) or have no memory at all attend in no other layer than their own, if at all.
KINDS: dict[str, Callable[[Any], LayerKind]] = {
    FULL: make_full_attention,
    SLIDING: make_sliding_attention,
    "chunked_attention": make_chunked_attention,
    **dict.fromkeys(("linear_attention", "mamba", "conv", "hybrid", "moe", "mlp"), make_full_attention),
}


def layer_kinds(config: Any) -> tuple[LayerKind, ...]:
    """Of each layer in its order. `config`: transformers' config of the text model."""
    names = getattr(config, "layer_types", None) or [default_kind(config)] * config.num_hidden_layers
    made = {name: KINDS[name](config) for name in {*names}}
    return tuple(made[name] for name in names)


def default_kind(config: Any) -> str:
    """Of all layers, where the config does not tell them apart."""
    slides = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return SLIDING if slides else FULL


def check_layers(base: BaseModel) -> None:
    """Raises `UserError` for a kind of layer that ftray does not compute."""
    check_config(text_config(base), name=base.name)


def check_config(config: dict[str, Any], *, name: str) -> None:
    """`config`: of a config.json, its text model's."""
    for kind in config.get("layer_types") or ():
        if kind not in KINDS:
            what = kind.replace("_", " ")
            raise UserError(f"base_model: {name} uses {what}, which ftray does not compute yet; choose another base")


__all__ = [
    "KINDS",
    "ChunkedAttention",
    "FullAttention",
    "LayerKind",
    "SlidingAttention",
    "check_config",
    "check_layers",
    "layer_kinds",
]
