"""Whether a base has what an adapter is to change, before anything is loaded."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ftray.config.adapter import AdapterConfig, target_pattern
from ftray.errors import AdapterError, UserError
from ftray.model.adapters.tokens import token_ids
from ftray.model.base import BaseModel

EXPERTS = ".experts."  # in the names of their weights
PACKED, MXFP4_BLOCK = "_blocks", 32  # [experts, out, blocks, 16 bytes] of MXFP4
BESIDE_WEIGHTS = ("bias", "_scales", "_scale_inv", "_scale")


Shapes = Mapping[str, Sequence[int]]  # of the tensors in a base's files


def check_targets(base: BaseModel, shapes: Shapes, config: AdapterConfig, tokenizer: Any) -> None:
    """By the names in the base's files. What is not among them may still be: transformers joins and renames some, so
    then the model itself is asked, without its weights. Raises `AdapterError`."""
    token_ids(tokenizer, config.train_tokens)
    if config.experts and not expert_shapes(shapes):
        raise AdapterError("adapter.experts: this base has no experts that LoRA can change; leave it out")
    linear = [name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 2]
    targets = config.targets if isinstance(config.targets, list) else []
    if all(any(map(target_pattern(target).fullmatch, linear)) for target in targets):
        return
    from ftray.model.adapters.lora import matching_modules
    from ftray.model.weights import model_without_weights

    matching_modules(model_without_weights(base), list(targets))


def describe_experts(shapes: Shapes, config: AdapterConfig) -> str | None:
    """What is said of a mixture's experts before a run; None: it is none."""
    experts = expert_shapes(shapes)
    if not experts:
        return None
    inside, extra = sum(map(math.prod, experts)), num_lora_parameters(experts, config.rank)
    if config.experts:
        return f"experts: {inside:,} parameters, with {extra:,} of LoRA; their routers stay frozen"
    return (
        f"experts: their {inside:,} parameters stay frozen, and their routers; adapter.experts: true would train "
        f"{extra:,} parameters for them"
    )


def expert_shapes(shapes: Shapes) -> list[Sequence[int]]:
    """Of their matrices: [out, in] of one, or [experts, ...] of all; packed ones as large as they are whole."""
    found = []
    for name, shape in shapes.items():
        if EXPERTS in name and name.endswith(PACKED):
            found.append([*shape[:2], MXFP4_BLOCK * shape[2]])
        elif EXPERTS in name and len(shape) > 1 and not name.endswith(BESIDE_WEIGHTS):
            found.append(shape)
    return found


def num_lora_parameters(shapes: Sequence[Sequence[int]], rank: int) -> int:
    return sum(math.prod(shape[:-2]) * rank * (shape[-1] + shape[-2]) for shape in shapes)


def check_embedding(base: BaseModel, shapes: Shapes, tokenizer: Any, ids: Any, name_of: Any) -> None:
    """A tokenizer may have more tokens than the embedding has rows. `ids`: of all data, flat; `name_of(place)`: the row
    of the data there. Raises `UserError` for the first token without a row."""
    rows = embedding_rows(shapes)
    if rows is None or len(tokenizer) <= rows:
        return
    import numpy as np

    beyond = np.flatnonzero(ids >= rows)
    if len(beyond):
        token = int(ids[beyond[0]])
        raise UserError(
            f"data: row {name_of(int(beyond[0]))}: {tokenizer.convert_ids_to_tokens(token)!r} is token {token}, and "
            f"the embedding of {base.name} has {rows} rows; take it out of the data, or resize the base"
        )


def embedding_rows(shapes: Shapes) -> int | None:
    endings = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "embeddings.weight", "embedding.weight")
    named = (shape[0] for name, shape in shapes.items() if name.endswith(endings))
    return next(named, None)
