"""One engine with its adapters: what a Ray Serve replica holds. Plain asyncio, no ray."""

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import Any

import torch

from ftray.config import ServeConfig
from ftray.errors import AdapterError, FtrayError, UserError
from ftray.infer.checks import check_token_ids
from ftray.infer.engines import make_engine
from ftray.infer.protocol import PreparedAdapter, Request, Sampling, TokenEvent, TokenLogprobs
from ftray.model.base import prepare_base
from ftray.model.chat import ChatRenderer, check_messages
from ftray.model.hardware import choose_hardware
from ftray.registry import Registry
from ftray.serve.prefetch import Prefetcher
from ftray.serve.residency import AdapterResidency
from ftray.serve.runner import EngineRunner

Event = dict[str, Any]


@dataclass(frozen=True)
class GenerateJob:
    """What the ingress asks of a replica: chat messages, or a prompt as text or ids."""

    prompt: list[dict[str, Any]] | str | list[int]
    is_chat: bool
    sampling: Sampling
    adapter: str | None  # NAME@N
    tenant: str = ""  # replicas share their time fairly among tenants and adapters
    priority: float = 1.0  # the tenant's share
    every_s: float = 0.0  # tokens are told so often, together; 0: each at once


class EngineReplica:
    def __init__(self, config: ServeConfig):
        torch.set_num_threads(max(1, int(config.replicas.cpus_each)))
        self.config = config
        self.base = prepare_base(config.base_model)
        hardware = choose_hardware(use_gpu=config.replicas.gpus_each > 0)
        engine = make_engine(self.base, hardware, config.engine, config.adapters)
        self.engine = engine
        self.renderer = ChatRenderer(engine.tokenizer)
        self.runner = EngineRunner(engine)
        self._num_in_flight = 0  # answers running, waiting, or waiting for their adapter
        self.registry = Registry(config.adapters.registry, tolerant=True)
        self.residency = AdapterResidency(
            self._prepare, self._load, self._unload, budget_bytes=config.adapters.host_budget
        )

    async def preload(self) -> None:
        """The configured adapters, and from now on those that aliases move to."""
        for reference in self.config.adapters.preload:
            exact = await asyncio.to_thread(self.registry.resolve, reference)
            await self.residency.prefetch(str(exact))
        self._following = asyncio.create_task(Prefetcher(self.registry, self.residency).follow())

    async def generate(self, job: GenerateJob) -> AsyncGenerator[Event]:
        """First {"prompt_tokens": n}, then tokens of the answers (`_token_event`); or one {"error"}."""
        if self._num_in_flight >= self.config.engine.max_sequences + self.config.engine.max_waiting:
            yield {"error": "too many requests wait for this endpoint; try again", "status": 429}
            return
        self._num_in_flight += job.sampling.n
        try:
            prompt_ids = self._prompt_ids(job)
            pin = self.residency.pinned(job.adapter) if job.adapter is not None else contextlib.nullcontext()
            # Closed in order when a client leaves: the engine lets go of the sequence before the adapter is unpinned.
            async with pin, contextlib.aclosing(self._tokens(job, prompt_ids)) as events:
                async for event in together(events, every_s=job.every_s):
                    yield event
        except AdapterError as error:
            yield {"error": str(error), "status": 400, "adapter_failed": True}
        except UserError as error:
            yield {"error": str(error), "status": 400}
        except FtrayError as error:
            yield {"error": str(error), "status": 503}
        finally:
            self._num_in_flight -= job.sampling.n

    def close(self) -> None:
        """Ends the engine's thread, and its processes where it has some."""
        self.runner.close()
        self.engine.close()

    async def warm(self, key: str) -> str | None:
        """Brings the adapter in; returns why it could not be."""
        try:
            await self.residency.prefetch(key)
        except FtrayError as error:
            return str(error)
        return None

    def in_use(self, key: str) -> int:
        """Requests that run with this adapter."""
        return self.residency.num_pins(key)

    def check_health(self) -> None:
        if not self.runner.is_alive:
            raise RuntimeError(f"the engine has stopped: {self.runner.failure}")

    def _prompt_ids(self, job: GenerateJob) -> list[int]:
        if job.is_chat:
            assert isinstance(job.prompt, list)
            return self.renderer.prompt_ids(check_messages(job.prompt))
        if isinstance(job.prompt, str):
            return self.engine.tokenizer(job.prompt)["input_ids"]
        check_token_ids(job.prompt, key="prompt", vocab_size=self.engine.vocab_size)
        return list(job.prompt)  # pyright: ignore[reportReturnType]

    async def _tokens(self, job: GenerateJob, prompt_ids: list[int]) -> AsyncGenerator[Event]:
        request = Request(uuid.uuid4().hex, prompt_ids, job.sampling, job.adapter, job.tenant, job.priority)
        told = False
        async with contextlib.aclosing(self.runner.generate(request)) as events:
            async for event in events:
                if not told:  # only now: a request that the engine refuses has no beginning
                    yield {"prompt_tokens": len(prompt_ids)}
                    told = True
                if event.finish_reason == "error":
                    yield {"error": "the engine could not finish this answer; try again", "status": 500}
                    return
                yield self._token_event(event)

    def _token_event(self, event: TokenEvent) -> Event:
        return {
            "index": event.index,
            "num_tokens": 1,
            "text": event.text,
            "finish_reason": event.finish_reason,
            "cached_tokens": event.num_cached_prompt_tokens,
            "logprobs": [] if event.logprobs is None else [self._told(event.token_id, event.logprobs)],
        }

    def _told(self, token_id: int, logprobs: TokenLogprobs) -> Event:
        def entry(token: int, logprob: float) -> Event:
            return {"token": self.engine.tokenizer.decode([token]), "logprob": logprob}

        return entry(token_id, logprobs.chosen) | {"top": [entry(*pair) for pair in logprobs.top]}

    async def _prepare(self, key: str) -> PreparedAdapter:
        """In a thread: decoding goes on while an adapter is fetched, read and checked."""

        def prepare() -> PreparedAdapter:
            version = self.registry.get(key)
            check_base(key, version.metadata, self.base)
            return self.engine.prepare_adapter(key, self.registry.directory(version))

        return await asyncio.to_thread(prepare)

    async def _load(self, prepared: Any) -> None:
        await self.runner.call(lambda: self.engine.load_adapter(prepared))

    async def _unload(self, key: str) -> None:
        await self.runner.call(lambda: self.engine.unload_adapter(key))


async def together(events: AsyncIterator[Event], *, every_s: float) -> AsyncIterator[Event]:
    """Joins the tokens of each answer that come within `every_s`; its first and its last are told at once."""
    held: dict[int, Event] = {}
    told_at: dict[int, float] = {}
    async for event in events:
        index = event.get("index")
        if index is None or every_s == 0:
            yield event
            continue
        before = held.pop(index, None)
        if before is not None:
            event |= {key: before[key] + event[key] for key in ("num_tokens", "text", "logprobs")}
        now = time.monotonic()
        if event["finish_reason"] or now - told_at.get(index, 0.0) >= every_s:
            told_at[index] = now
            yield event
        else:
            held[index] = event


def check_base(key: str, metadata: dict[str, Any], base: Any, *, here: str = "this endpoint serves") -> None:
    """Refuses an adapter of another base, naming both. A foreign PEFT directory may carry no fingerprint."""
    fingerprint = metadata.get("base_fingerprint")
    if fingerprint is not None and fingerprint != base.fingerprint:
        raise AdapterError(
            f"{key}: trained on {metadata.get('base_model')} ({fingerprint[:12]}), {here} {base}; "
            "publish an adapter trained on this base"
        )
