"""What one request has come to so far: what the client, the ledger, a canary's watch and the metrics are told."""

import asyncio
import secrets
import time
from dataclasses import dataclass, field

from ftray.serve.openai.schemas import usage_body
from ftray.serve.protocol import Failed, Started, Tokens
from ftray.serve.routing.model_names import ServedModel
from ftray.serve.tenants.accounts import Usage
from ftray.serve.tenants.auth import Caller


@dataclass
class Answer:
    caller: Caller
    model: ServedModel
    request_id: str
    began: float = field(default_factory=time.perf_counter)
    nonce: str = field(default_factory=lambda: secrets.token_hex(4))  # a caller may give two requests one id
    prompt_tokens: int = 0
    cached: dict[int, int] = field(default_factory=dict)  # prompt tokens found, by each prompt's first answer
    completion_tokens: int = 0
    adapter_s: float = 0.0  # until the adapter was in memory
    queue_s: float | None = None  # then, until the engine took it up
    first_token_s: float | None = None
    last_token_s: float | None = None
    is_whole: bool = False
    error: str | None = None  # why it is not, where the client did not simply leave
    is_fault: bool = False  # of the version or its replica
    settling: asyncio.Task[None] | None = None  # the ledger and the canary's watch are being told

    def start(self, event: Started) -> None:
        self.prompt_tokens, self.adapter_s, self.queue_s = event.prompt_tokens, event.adapter_s, event.queue_s
        self.cached = {}
        self.completion_tokens = 0

    def take(self, event: Tokens) -> None:
        self.last_token_s = time.perf_counter() - self.began
        if self.first_token_s is None:
            self.first_token_s = self.last_token_s
        self.completion_tokens += event.num_tokens
        if event.is_first_answer:  # the others to the same prompt find what it computed
            self.cached[event.index] = event.cached_tokens

    def fail(self, event: Failed) -> None:
        self.error, self.is_fault = event.message, event.is_fault

    @property
    def cached_tokens(self) -> int:
        return sum(self.cached.values())

    @property
    def token_s(self) -> float | None:
        """Mean time between tokens. Of several answers that are written at once, of them all."""
        if self.first_token_s is None or self.last_token_s is None or self.completion_tokens < 2:
            return None
        return (self.last_token_s - self.first_token_s) / (self.completion_tokens - 1)

    @property
    def outcome(self) -> str:
        return "whole" if self.is_whole else "cut"

    def usage(self) -> Usage:
        return Usage(
            request_id=f"{self.request_id}.{self.nonce}",
            tenant=self.caller.tenant.name,
            model=self.model.id,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            completion_tokens=self.completion_tokens,
            outcome=self.outcome,
            at=time.time(),
        )

    @property
    def usage_body(self) -> dict:
        return usage_body(self.prompt_tokens, self.completion_tokens, self.cached_tokens)
