"""Texts to vectors, for bases that were trained for it.

Which ones were, and how their hidden states become a vector, a base says itself in the files that sentence-transformers
keeps (`1_Pooling/config.json`, `modules.json`; https://sbert.net). A chat model's hidden states are no good embeddings,
so other bases are refused.

Shapes: T tokens of all texts, n texts, E hidden size.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ftray.errors import UserError

POOLING = {"pooling_mode_lasttoken": "last", "pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "first"}


@dataclass(frozen=True)
class Embedding:
    pooling: str  # last | mean | first token
    normalize: bool

    def pool(self, hidden_TE: Tensor, lengths: Sequence[int]) -> Tensor:
        """[n, E], float32."""
        texts = hidden_TE.float().split(list(lengths))
        rows = {
            "last": lambda text_LE: text_LE[-1],
            "first": lambda text_LE: text_LE[0],
            "mean": lambda text_LE: text_LE.mean(0),
        }
        pooled_nE = torch.stack([rows[self.pooling](text) for text in texts])
        return torch.nn.functional.normalize(pooled_nE, dim=-1) if self.normalize else pooled_nE


def embedding_of(base: Path, name: str) -> Embedding:
    """Raises `UserError` where the base is no embedding model, or of a kind that is not served here."""
    file = base / "1_Pooling" / "config.json"
    if not file.exists():
        raise UserError(
            f"{name} is no embedding model (it has no 1_Pooling/config.json); serve one to use /v1/embeddings"
        )
    config = json.loads(file.read_text())
    chosen = [kind for key, kind in POOLING.items() if config.get(key)]
    others = [key for key, value in config.items() if key.startswith("pooling_mode") and value and key not in POOLING]
    if len(chosen) != 1 or others:
        raise UserError(f"{name}: its pooling ({', '.join(others) or 'several at once'}) is not served here")
    modules = base / "modules.json"
    kinds = [entry["type"].rpartition(".")[2] for entry in json.loads(modules.read_text())] if modules.exists() else []
    unknown = set(kinds) - {"Transformer", "Pooling", "Normalize"}
    if unknown:
        raise UserError(f"{name}: its module {', '.join(sorted(unknown))} is not served here")
    return Embedding(chosen[0], normalize="Normalize" in kinds)
