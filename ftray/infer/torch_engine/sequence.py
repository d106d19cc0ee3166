"""One answer as the engine computes it, and the part of it that a step takes."""

import time
from dataclasses import dataclass, field

from torch import Tensor

from ftray.infer.protocol import Request, TokenLogprobs
from ftray.infer.text import TextStream
from ftray.infer.torch_engine.sampler import TokenSampler


@dataclass(eq=False)
class Sequence:
    """One answer. `tokens`: the prompt, then what was generated."""

    request: Request
    index: int
    text: TextStream
    sampler: TokenSampler
    max_tokens: int
    salt: bytes  # of the adapter version, and of who may share its pages
    tokens: list[int]
    num_cached: int = 0  # tokens whose keys and values are in the cache
    num_charged: int = 0  # tokens up to which its flow has paid, or found them
    pages: list[int] = field(default_factory=list)
    names: list[bytes] = field(default_factory=list)  # of its full pages
    states: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)  # of recurrent modules
    kept_state: bytes | None = None  # the page of its answer whose state is kept
    num_found: int | None = None  # prompt tokens found in the cache when it first ran
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # so far, where they are asked for
    added_at: float = field(default_factory=time.monotonic)
    queued_s: float = 0.0  # until it first ran
    slotless_since: int | None = None  # the step since which its adapter cannot have a slot
    crowded_out_since: int | None = None  # the step since which it is next, and only others' many places are in its way
    siblings: list["Sequence"] = field(default_factory=list)  # wait until the prompt's pages are there to share

    def ends_at(self, token: int, stop_ids: set[int]) -> bool:
        """`stop_ids`: of the engine."""
        return not self.request.sampling.ignore_eos and (token in stop_ids or token in self.request.stop_ids)

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def num_pending(self) -> int:
        return len(self.tokens) - self.num_cached

    @property
    def wants_prompt_logprobs(self) -> bool:
        wanted = self.request.sampling.prompt_logprobs is not None
        return wanted and len(self.prompt_logprobs) < self.num_prompt - 1


@dataclass(frozen=True)
class Piece:
    sequence: Sequence
    num_tokens: int

    @property
    def is_last(self) -> bool:
        """After it the sequence's next token can be drawn."""
        return self.num_tokens == self.sequence.num_pending
