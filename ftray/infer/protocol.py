"""What a caller knows of an engine: requests in, tokens out, adapters loaded and unloaded by key."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

# error: the engine lost this answer, and no other; structure: what it must match is beyond the parser's limits.
FinishReason = Literal["stop", "length", "error", "structure"]


@dataclass(frozen=True)
class StructuredOutput:
    """What the answer must be: text of a JSON schema or a regular expression."""

    kind: Literal["json_schema", "regex"]
    text: str
    parts: tuple[tuple[str, str], ...] = ()
    """(JSON pointer, what the caller calls what is there), for messages: a tool's parameters within all of them."""

    @property
    def label(self) -> str:
        """As the request has it: the one tool, or all of them."""
        if len(self.parts) > 1:
            return self.parts[0][1].partition("[")[0]
        return self.parts[0][1] if self.parts else "response_format"


@dataclass(frozen=True)
class SamplingParams:
    """Penalties are OpenAI's (frequency, presence: subtracted for answer tokens) and CTRL's (repetition: logits of
    prompt and answer tokens divided, Keskar et al. 2019, arXiv 1909.05858)."""

    temperature: float = 1.0  # 0: the most likely token
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0  # tokens less likely than this share of the most likely one are left out
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    n: int = 1  # answers to the one prompt
    max_tokens: int | None = None  # at most, within the context; None: to its end
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False  # go on to max_tokens
    logprobs: int | None = None  # how many of the likeliest tokens are told beside the chosen one
    prompt_logprobs: int | None = None  # the same for the prompt's tokens, with the first event of each answer
    structure: StructuredOutput | None = None


@dataclass(frozen=True)
class Request:
    id: str
    prompt_ids: Sequence[int]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    adapter: str | None = None  # the key it was loaded under; None: the base model
    tenant: str = ""  # who asks, if that is known: tenants and adapters share the engine fairly
    user: str = ""  # the name that an unknown caller gives
    priority: float = 1.0  # the share of this flow against others
    stop_ids: frozenset[int] = frozenset()  # at which its answers end too, beside the engine's own
    cache_salt: str = ""  # pages of the prompt are shared with requests of the same one

    @property
    def flow(self) -> tuple[str, str]:
        """What `fair_queue.py` counts its tokens for: an owner's flow. Whoever is not known can give any number of
        names, which must not make the share of one adapter larger; so then the adapter is the owner."""
        adapter = self.adapter or ""
        return (self.tenant, adapter) if self.tenant else (adapter, self.user)


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms under the model itself, before temperature, penalties and structure."""

    chosen: float
    top: tuple[tuple[int, float], ...]  # (token, log-probability), likeliest first


@dataclass(frozen=True)
class TokenEvent:
    """One more token of a request. `text` is what can be shown so far beyond what earlier events showed."""

    request_id: str
    token_id: int
    text: str
    num_completion_tokens: int
    finish_reason: FinishReason | None  # set in the answer's last event
    index: int = 0  # which of the n answers
    num_cached_prompt_tokens: int = 0  # taken from the cache instead of computed
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None  # of every prompt token but the first
    queued_s: float = 0.0  # the request waited so long before it first ran


@dataclass(frozen=True)
class EngineStats:
    num_running: int
    num_waiting: int
    num_preemptions: int
    kv_tokens_used: int
    kv_tokens_total: int
    prompt_tokens: int  # of all requests since the start
    prompt_tokens_cached: int
    adapters: tuple[str, ...]  # in memory
    adapters_on_device: tuple[str, ...]
    device_adapter_bytes: int


class PreparedAdapter(Protocol):
    """A checked adapter in memory, not yet known to the engine."""

    @property
    def key(self) -> str: ...

    @property
    def num_bytes(self) -> int: ...


class Engine(Protocol):
    """Not thread-safe but for `prepare_adapter`, `prepare_structure` and `stats`: one thread owns an engine and calls
    `step` while `has_work`."""

    tokenizer: Any
    vocab_size: int
    stop_ids: set[int]  # at which an answer ends

    def add(self, request: Request) -> None:
        """Queues a request. Raises `UserError` when it can never run: too long, unknown adapter, bad structure."""
        ...

    def step(self) -> list[TokenEvent]:
        """One iteration over everything that runs: at most one new token per sequence."""
        ...

    def cancel(self, request_id: str) -> None: ...

    @property
    def has_work(self) -> bool: ...

    def prepare_adapter(self, key: str, directory: Path) -> PreparedAdapter:
        """Reads and checks an adapter, in any thread while the engine steps. Raises `AdapterError`."""
        ...

    def prepare_structured_output(self, structure: StructuredOutput, num_requests: int = 1) -> None:
        """Compiles it, in any thread while the engine steps; `add` of so many requests then finds it. Raises
        `UserError` for a bad one."""
        ...

    def load_adapter(self, prepared: Any) -> Future[None] | None:
        """What `prepare_adapter` of the same engine returned. Under a key that is loaded already it replaces it; raises
        `AdapterError` while a request that uses it is in flight. With a future it goes on beside steps, and requests
        may use it once that is done."""
        ...

    def unload_adapter(self, key: str) -> Future[None] | None:
        """Nobody can use it from now on; with a future its memory is free once that is done. Raises `AdapterError`
        while a request that uses it is in flight."""
        ...

    def embed(self, texts: Sequence[Sequence[int]], adapter: str | None) -> Any:
        """Vectors [n, E] of texts as token ids, a float32 tensor. Raises `UserError` where base or engine have none."""
        ...

    def stats(self) -> EngineStats: ...

    def close(self) -> None: ...
