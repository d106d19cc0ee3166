"""What the ingress asks of a replica, and what comes back."""

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

from ftray.infer.protocol import SamplingParams


@dataclass(frozen=True)
class GenerateJob:
    """For each prompt: chat messages, text, or ids."""

    prompts: list[list[dict[str, Any]] | str | list[int]]
    is_chat: bool
    sampling: SamplingParams
    adapter: str | None  # NAME@N
    cache_salt: str = ""  # who may find what its prompts have left in the cache
    tenant: str = ""  # replicas share their time fairly among tenants and adapters
    user: str = ""  # the name that a caller who is no tenant gives
    priority: float = 1.0  # the tenant's share
    tools: tuple[dict[str, Any], ...] = ()  # told with chat messages
    echo: bool = False  # each answer begins with its prompt
    is_prompt_only: bool = False  # and has nothing else
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
    adapter: str | None = None  # whose rendering of messages it is


QuickJob = EmbedJob | TokenizeJob | TokenizerInfoJob


@dataclass(frozen=True)
class TokenLogprob:
    token: str
    logprob: float | None  # None: of a prompt's first token nothing is known
    top: tuple["TokenLogprob", ...] = ()  # the likeliest in its place
    raw: bytes | None = None  # where the token is no whole characters


@dataclass(frozen=True)
class EchoedPrompt:
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Started:
    """The engine has taken the request up."""

    prompt_tokens: int  # of all its prompts
    adapter_s: float  # until the adapter was in memory
    queue_s: float  # then, until the engine began


@dataclass(frozen=True)
class Tokens:
    """One or more tokens of an answer, or its end without another."""

    index: int  # of the answer
    is_first_answer: bool  # to its prompt
    num_tokens: int
    text: str
    finish_reason: str | None = None  # with its last tokens
    cached_tokens: int = 0  # of its prompt
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt: EchoedPrompt | None = None
    thought: str = ""  # of a chat: what the model thinks before it answers

    def followed_by(self, later: "Tokens") -> "Tokens":
        """Both of one answer."""
        return replace(
            later,
            num_tokens=self.num_tokens + later.num_tokens,
            text=self.text + later.text,
            thought=self.thought + later.thought,
            logprobs=self.logprobs + later.logprobs,
            prompt=self.prompt or later.prompt,
        )


@dataclass(frozen=True)
class Failed:
    """There is no more."""

    message: str
    status: int  # HTTP's
    code: str | None = None  # OpenAI's, and the parameter that is wrong
    param: str | None = None
    adapter_failed: bool = False  # the version is damaged
    replica_died: bool = False  # another may answer

    @property
    def is_fault(self) -> bool:
        """Of the version or its replica; a busy endpoint or a deadline is none."""
        return self.status in (500, 502) or self.adapter_failed


# A stream is `Started`, then `Tokens` of all answers, each to its `finish_reason`; `Failed` may end it anywhere.
Event = Started | Tokens | Failed


@dataclass(frozen=True)
class Vectors:
    vectors: list[list[float]]
    prompt_tokens: int


@dataclass(frozen=True)
class TokenIds:
    ids: list[int]
    strings: list[str] | None
    context_tokens: int  # of the endpoint


@dataclass(frozen=True)
class PlainText:
    text: str


@dataclass(frozen=True)
class TokenizerInfo:
    tokenizer_class: str
    chat_template: str | None
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None


QuickAnswer = Vectors | TokenIds | PlainText | TokenizerInfo | Failed


async def together(events: AsyncIterator[Event], *, every_s: float) -> AsyncIterator[Event]:
    """Joins the tokens of each answer that come within `every_s`; its first and its last are told at once."""
    held: dict[int, Tokens] = {}
    reported_at: dict[int, float] = {}
    async for event in events:
        if not isinstance(event, Tokens) or every_s == 0:
            yield event
            continue
        index = event.index
        before = held.pop(index, None)
        if before is not None:
            event = before.followed_by(event)
        now = time.monotonic()
        if event.finish_reason or now - reported_at.get(index, 0.0) >= every_s:
            reported_at[index] = now
            yield event
        else:
            held[index] = event
