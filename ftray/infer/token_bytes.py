"""The bytes of single tokens: a token may be part of a character, which is no text."""

import re
from functools import cached_property
from typing import Any

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # SentencePiece's


class TokenBytes:
    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer

    def of(self, token_id: int) -> bytes | None:
        """None for a token that a tokenizer of this kind does not tell the bytes of."""
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if token is None:
            return None
        if (byte := BYTE_TOKEN.fullmatch(token)) is not None:
            return bytes([int(byte[1], 16)])
        if all(character in self._byte_of for character in token):
            return bytes(self._byte_of[character] for character in token)
        return None

    @cached_property
    def _byte_of(self) -> dict[str, int]:
        """GPT-2's letters for bytes (Radford et al. 2019), which byte-level BPE tokenizers write their tokens in."""
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        return {letter: byte for byte, letter in bytes_to_unicode().items()}
