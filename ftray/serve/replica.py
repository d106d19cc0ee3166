"""One engine with its adapters: what a Ray Serve replica holds. Plain asyncio, no ray."""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncGenerator
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
        self.registry = Registry(config.adapters.registry)
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
        """First {"prompt_tokens": n}, then `_token_event` for every token of every answer; or one {"error"}."""
        if self._num_in_flight >= self.config.engine.max_sequences + self.config.engine.max_waiting:
            yield {"error": "too many requests wait for this endpoint; try again", "status": 429}
            return
        self._num_in_flight += job.sampling.n
        try:
            prompt_ids = self._prompt_ids(job)
            pin = self.residency.pinned(job.adapter) if job.adapter is not None else contextlib.nullcontext()
            # Closed in order when a client leaves: the engine lets go of the sequence before the adapter is unpinned.
            async with pin, contextlib.aclosing(self._tokens(job, prompt_ids)) as events:
                async for event in events:
                    yield event
        except UserError as error:
            yield {"error": str(error), "status": 400}
        except FtrayError as error:
            yield {"error": str(error), "status": 503}
        finally:
            self._num_in_flight -= job.sampling.n

    async def complete(self, job: GenerateJob) -> Event:
        """The whole answers at once: {"prompt_tokens", "cached_tokens", "completion_tokens", "answers": [{"text",
        "finish_reason", "logprobs"}]}."""
        answers: list[Event] = [{"text": "", "finish_reason": None, "logprobs": []} for _ in range(job.sampling.n)]
        whole: Event = {"completion_tokens": 0, "cached_tokens": 0}
        async for event in self.generate(job):
            if "error" in event:
                return event
            if "prompt_tokens" in event:
                whole |= event
                continue
            answer = answers[event["index"]]
            answer["text"] += event["text"]
            answer["finish_reason"] = event["finish_reason"]
            answer["logprobs"] += event["logprobs"]
            whole["completion_tokens"] += 1
            if event["index"] == 0:  # the others find what the first computed
                whole["cached_tokens"] = event["cached_tokens"]
        return whole | {"answers": answers}

    def close(self) -> None:
        """Ends the engine's thread, and its processes where it has some."""
        self.runner.close()
        self.engine.close()

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
        request = Request(uuid.uuid4().hex, prompt_ids, job.sampling, job.adapter, job.tenant)
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


def check_base(key: str, metadata: dict[str, Any], base: Any, *, here: str = "this endpoint serves") -> None:
    """Refuses an adapter of another base, naming both. A foreign PEFT directory may carry no fingerprint."""
    fingerprint = metadata.get("base_fingerprint")
    if fingerprint is not None and fingerprint != base.fingerprint:
        raise AdapterError(
            f"{key}: trained on {metadata.get('base_model')} ({fingerprint[:12]}), {here} {base}; "
            "publish an adapter trained on this base"
        )
