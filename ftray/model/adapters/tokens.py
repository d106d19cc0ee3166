"""Single tokens that are trained beside LoRA, by PEFT's `trainable_token_indices`: their rows of the embedding, and of
the output head where that is another matrix."""

from collections.abc import Sequence
from typing import Any

from ftray.errors import AdapterError


def token_ids(tokenizer: Any, tokens: Sequence[str]) -> list[int]:
    """Raises `AdapterError` for what is no token."""
    known = tokenizer.get_vocab()
    for token in tokens:
        if token not in known:
            raise AdapterError(
                f"adapter.train_tokens: {token!r} is no token of this base's tokenizer; add it there, with a row of "
                "the embedding, or name one that it has"
            )
    return [known[token] for token in tokens]


def trained_rows(model: Any, ids: Sequence[int]) -> dict[str, list[int]]:
    """As PEFT takes them: by the name of the matrix. Raises `AdapterError` where it has no such row."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if ids and max(ids) >= embedding.num_embeddings:
        raise AdapterError(
            f"adapter.train_tokens: token {max(ids)} has no row in the embedding, which has {embedding.num_embeddings}"
        )
    is_tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    wanted = [embedding] if is_tied else [embedding, head]
    return {name.rpartition(".")[2]: list(ids) for name, module in model.named_modules() if module in wanted}
