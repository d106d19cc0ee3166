"""Which sequences take part in the next step. First come, first served; a sequence runs until it ends."""

from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ftray.infer.kv_cache import KVCache
from ftray.infer.protocol import Request
from ftray.infer.text import TextStream


@dataclass
class Sequence:
    request: Request
    text: TextStream
    generator: torch.Generator | None
    max_tokens: int
    slots: Tensor | None = None  # cache slots of prompt and answer, once admitted
    tokens: list[int] = field(default_factory=list)  # generated

    @property
    def num_cached(self) -> int:
        """Tokens whose keys and values are in the cache before a decoding step: all but the newest."""
        return len(self.request.prompt_ids) + len(self.tokens) - 1


class Scheduler:
    def __init__(self, cache: KVCache, *, max_sequences: int, max_prefill_tokens: int):
        self._cache = cache
        self._max_sequences = max_sequences
        self._max_prefill_tokens = max_prefill_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def admit(self) -> list[Sequence]:
        """Moves waiting sequences in while there is a place, cache, and room for their prompts in one step.

        A prompt over `max_prefill_tokens` goes alone rather than never. Returns the new ones, in order.
        """
        admitted: list[Sequence] = []
        room = self._max_prefill_tokens
        while self.waiting and len(self.running) + len(admitted) < self._max_sequences:
            sequence = self.waiting[0]
            num_prompt = len(sequence.request.prompt_ids)
            if admitted and num_prompt > room:
                break
            slots = self._cache.reserve(num_prompt + sequence.max_tokens)
            if slots is None:
                break
            sequence.slots = slots
            room -= num_prompt
            admitted.append(self.waiting.popleft())
        return admitted

    def remove(self, sequence: Sequence) -> None:
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        if sequence.slots is not None:
            self._cache.release(sequence.slots)
            sequence.slots = None

    def find(self, request_id: str) -> Sequence | None:
        return next((s for s in [*self.running, *self.waiting] if s.request.id == request_id), None)
