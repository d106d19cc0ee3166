"""What a caller knows of an engine: requests in, tokens out, adapters loaded and unloaded by key."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Sampling:
    temperature: float = 1.0  # 0: the most likely token
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int | None = None  # None: to the end of the context
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    id: str
    prompt_ids: Sequence[int]
    sampling: Sampling = field(default_factory=Sampling)
    adapter: str | None = None  # the key it was loaded under; None: the base model


@dataclass(frozen=True)
class TokenEvent:
    """One more token of a request. `text` is what can be shown so far beyond what earlier events showed."""

    request_id: str
    token_id: int
    text: str
    num_completion_tokens: int
    finish_reason: FinishReason | None  # set in the last event


@dataclass(frozen=True)
class EngineStats:
    num_running: int
    num_waiting: int
    kv_tokens_used: int
    kv_tokens_total: int
    adapters: tuple[str, ...]


class Engine(Protocol):
    """Not thread-safe: one thread owns an engine and calls `step` while `has_work`."""

    def add(self, request: Request) -> None:
        """Queues a request. Raises `UserError` when it can never run: too long, unknown adapter."""
        ...

    def step(self) -> list[TokenEvent]:
        """One iteration over everything that runs: at most one new token per sequence."""
        ...

    def cancel(self, request_id: str) -> None: ...

    @property
    def has_work(self) -> bool: ...

    def load_adapter(self, key: str, directory: Path) -> int:
        """Returns the bytes it takes. Raises `AdapterError`; other adapters are not touched."""
        ...

    def unload_adapter(self, key: str) -> None: ...

    def stats(self) -> EngineStats: ...
