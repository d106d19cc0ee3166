"""What comes after the decoder, a module for each. An objective names its head; most want the language model's own."""

from ftray.model.heads.causal_lm import CAUSAL_LM
from ftray.model.heads.protocol import Head
from ftray.plugins import is_plugin, load_plugin

# Rows of logits that exist at one time: 1,024 rows of a 150k vocabulary in float32 are 600 MB.
LOGIT_ROWS = 1024

HEADS: dict[str, Head] = {"causal_lm": CAUSAL_LM}


def head_of(name: str) -> Head:
    """Of an objective's `head`. Raises `UserError` for a plug-in that is none."""
    return load_plugin(name, Head, key="the objective's head") if is_plugin(name) else HEADS[name]


__all__ = ["CAUSAL_LM", "LOGIT_ROWS", "Head", "head_of"]
