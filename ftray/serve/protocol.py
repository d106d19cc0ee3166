"""What the ingress asks of a replica, and what comes back."""

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from ftray.infer.protocol import SamplingParams

Event = dict[str, Any]


@dataclass(frozen=True)
class GenerateJob:
    """For each prompt: chat messages, text, or ids."""

    prompts: list[list[dict[str, Any]] | str | list[int]]
    is_chat: bool
    sampling: SamplingParams
    adapter: str | None  # NAME@N
    tenant: str = ""  # replicas share their time fairly among tenants and adapters
    user: str = ""  # the name that a caller who is no tenant gives
    priority: float = 1.0  # the tenant's share
    tools: tuple[dict[str, Any], ...] = ()  # told with chat messages
    echo: bool = False  # each answer begins with its prompt
    every_s: float = 0.0  # tokens are told so often, together; 0: each at once

    @property
    def num_answers(self) -> int:
        return len(self.prompts) * self.sampling.n


@dataclass(frozen=True)
class EmbedJob:
    texts: list[str | list[int]]
    adapter: str | None
    dimensions: int | None = None
    tenant: str = ""
    user: str = ""


def owner(job: GenerateJob | EmbedJob) -> str:
    """Whose places it takes. A name that anybody can give has none of its own."""
    return job.tenant or job.adapter or ""


@dataclass(frozen=True)
class TokenizerInfoJob:
    """What the tokenizer is."""


@dataclass(frozen=True)
class TokenizeJob:
    """A text or messages to token ids; or ids to text."""

    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: tuple[dict[str, Any], ...] = ()
    ids: list[int] | None = None
    with_special: bool = True
    with_strings: bool = False  # each token's text too


QuickJob = EmbedJob | TokenizeJob | TokenizerInfoJob


async def together(events: AsyncIterator[Event], *, every_s: float) -> AsyncIterator[Event]:
    """Joins the tokens of each answer that come within `every_s`; its first and its last are told at once."""
    held: dict[int, Event] = {}
    reported_at: dict[int, float] = {}
    async for event in events:
        index = event.get("index")
        if index is None or every_s == 0:
            yield event
            continue
        before = held.pop(index, None)
        if before is not None:
            event |= {key: before[key] + event[key] for key in ("num_tokens", "text", "logprobs")}
        now = time.monotonic()
        if event["finish_reason"] or now - reported_at.get(index, 0.0) >= every_s:
            reported_at[index] = now
            yield event
        else:
            held[index] = event
