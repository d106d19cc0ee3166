"""One engine with its adapters: what a Ray Serve replica holds. Plain asyncio, no ray."""

import asyncio
import contextlib
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ftray.config import ServeConfig
from ftray.errors import AdapterError, FtrayError, RequestError, StoreError, UserError
from ftray.infer.checks import check_token_ids, too_long
from ftray.infer.engines import make_engine
from ftray.infer.protocol import PreparedAdapter, Request, StructuredOutput
from ftray.infer.thoughts import split
from ftray.infer.token_bytes import TokenBytes
from ftray.model.base import prepare_base
from ftray.model.hardware import choose_hardware
from ftray.registry import Registry
from ftray.serve.protocol import (
    EmbedJob,
    Event,
    Failed,
    GenerateJob,
    PlainText,
    QuickAnswer,
    QuickJob,
    Started,
    TokenIds,
    TokenizeJob,
    TokenizerInfo,
    TokenizerInfoJob,
    Vectors,
    owner,
    together,
)
from ftray.serve.replica.admission import Admission
from ftray.serve.replica.engine_thread import EngineRunner, merged
from ftray.serve.replica.fair_semaphore import FairSemaphore
from ftray.serve.replica.prefetch import Prefetcher
from ftray.serve.replica.prompts import PromptReader
from ftray.serve.replica.residency import AdapterResidency
from ftray.serve.replica.token_events import echoed, tokens_of
from ftray.serve.replica.versions import hosted_directory, with_rank
from ftray.serve.telemetry.metrics import UNMETERED, AdapterMetrics, EngineMetrics, Meter

log = logging.getLogger("ftray.serve")

ANY_TEXT = StructuredOutput("regex", ".*")
TOO_COMPLEX = Failed(
    "response_format: the schema or expression is beyond the parser's limits within this answer; simplify it (fewer "
    "nested repetitions, branches that differ sooner)",
    400,
    param="response_format",
)


class EngineReplica:
    def __init__(
        self,
        config: ServeConfig,
        *,
        meter: Meter = UNMETERED,
        engine_failed: Callable[[BaseException], None] = lambda error: None,
    ):
        torch.set_num_threads(max(1, int(config.replicas.cpus_each)))
        self.config = config
        self.base = prepare_base(config.base_model, chat=config.chat)
        gpus = config.replicas.gpus_each
        hardware = choose_hardware(use_gpu=gpus > 0, gpu_share=min(1.0, gpus))
        self.registry = Registry(config.adapters.registry, tolerant=True)
        adapters = with_rank(config.adapters, config.engine, self.registry)
        engine = make_engine(self.base, hardware, config.engine, adapters)
        self.engine = engine
        self._token_bytes = TokenBytes(engine.tokenizer)
        self._shared = frozenset(config.tenants.shared_prompts)
        self.runner = EngineRunner(engine, failed=engine_failed)
        self._compiling = FairSemaphore(1)  # one schema at a time: the decoder needs the cores
        self._embedding = FairSemaphore(1)  # one group of texts at a time: others decode in between
        self._admission = Admission(config.engine.max_sequences + config.engine.max_waiting)
        self._prompts = PromptReader(engine, self.base, self.registry, context_tokens=config.engine.context_tokens)
        self.residency = AdapterResidency(
            self._prepare,
            self._load,
            self._unload,
            budget_bytes=config.adapters.host_budget,
            signal=AdapterMetrics(meter).note,
        )
        self._engine_metrics = EngineMetrics(meter)

    async def preload(self) -> None:
        """The configured adapters, and from now on those that aliases move to. And the table that the first structured
        answer needs: making it stops every thread for some tenths of a second."""
        with contextlib.suppress(UserError):  # a tokenizer that cannot guide answers
            await asyncio.to_thread(self.engine.prepare_structured_output, ANY_TEXT)
        for reference in self.config.adapters.preload:
            try:
                exact = await asyncio.to_thread(self.registry.resolve, reference)
                await self.residency.prefetch(str(exact))
            except StoreError:  # Ray Serve tries again to start the replica
                raise
            except FtrayError as error:  # withdrawn or damaged since the endpoint was deployed: the others are served
                log.warning("adapters.preload: %s", error)
        self._following = asyncio.create_task(Prefetcher(self.registry, self.residency).follow())

    async def generate(self, job: GenerateJob) -> AsyncGenerator[Event]:
        if (refusal := self._admission.refusal(owner(job), job.num_answers)) is not None:
            yield refusal
            return
        self._admission.take(owner(job), job.num_answers)
        try:
            prompts = await self._read(job)
            asked = time.perf_counter()
            # Closed in order when a client leaves: the engine lets go of the sequence before the adapter is unpinned.
            async with self._pinned(job):
                adapter_s = time.perf_counter() - asked
                async with contextlib.aclosing(self._tokens(job, prompts, adapter_s)) as events:
                    async for event in together(events, every_s=job.every_s):
                        yield event
        except FtrayError as error:
            yield failed(error)
        finally:
            self._admission.give_back(owner(job), job.num_answers)

    async def _read(self, job: GenerateJob) -> list[list[int]]:
        """In threads: a text of megabytes or a large schema takes seconds, and others wait for their tokens."""
        if job.sampling.structure is not None:
            async with self._compiling.one(owner(job)):
                await asyncio.to_thread(self.engine.prepare_structured_output, job.sampling.structure, len(job.prompts))
        read = self._prompts

        def ids(prompt: Any) -> list[int]:
            return read.chat(prompt, job.tools, adapter=job.adapter) if job.is_chat else read.text(prompt, key="prompt")

        return await asyncio.to_thread(lambda: [ids(prompt) for prompt in job.prompts])

    async def answer(self, job: QuickJob) -> QuickAnswer:
        """What needs no queue."""
        try:
            match job:
                case EmbedJob():
                    return await self._embed(job)
                case TokenizeJob():
                    return await asyncio.to_thread(self._tokenize, job)
                case TokenizerInfoJob():
                    return self._tokenizer_info()
        except FtrayError as error:
            return failed(error)

    async def _embed(self, job: EmbedJob) -> Vectors | Failed:
        if (refusal := self._admission.refusal(owner(job), len(job.texts))) is not None:
            return refusal
        self._admission.take(owner(job), len(job.texts))
        try:
            return await self._vectors(job)
        finally:
            self._admission.give_back(owner(job), len(job.texts))

    async def _vectors(self, job: EmbedJob) -> Vectors:
        texts = await asyncio.to_thread(lambda: [self._prompts.text(text, key="input") for text in job.texts])
        context = self.config.engine.context_tokens
        longest = max(map(len, texts))
        if longest > context:
            raise too_long(f"{longest}", context_tokens=context, param="input")
        vectors: list[list[float]] = []
        async with self._pinned(job):
            for group in groups_within(texts, self.config.engine.max_prefill_tokens):
                async with self._embedding.one(owner(job)):
                    found_nE = await self.runner.call(partial(self.engine.embed, group, job.adapter))
                size = found_nE.shape[1]
                if job.dimensions is not None and job.dimensions > size:
                    raise UserError(f"dimensions: {job.dimensions} is over this base's {size}")
                if job.dimensions is not None:
                    found_nE = torch.nn.functional.normalize(found_nE[:, : job.dimensions], dim=-1)
                vectors += found_nE.tolist()
        return Vectors(vectors, prompt_tokens=sum(map(len, texts)))

    def _tokenize(self, job: TokenizeJob) -> TokenIds | PlainText:
        tokenizer = self.engine.tokenizer
        if job.ids is not None:
            check_token_ids(job.ids, key="tokens", vocab_size=self.engine.vocab_size)
            return PlainText(tokenizer.decode(job.ids))
        if job.messages is not None:
            ids = self._prompts.chat(job.messages, job.tools, adapter=job.adapter)
        else:
            ids = self._prompts.text(job.text or "", key="prompt", with_special=job.with_special)
        strings = [tokenizer.decode([token]) for token in ids] if job.with_strings else None
        return TokenIds(ids, strings, context_tokens=self.config.engine.context_tokens)

    def _tokenizer_info(self) -> TokenizerInfo:
        tokenizer = self.engine.tokenizer
        special = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        return TokenizerInfo(type(tokenizer).__name__, tokenizer.chat_template, **special)

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

    async def measure(self) -> None:
        """Now and then: what is in memory and how busy the engine is, to the meter."""
        self._engine_metrics.measure(self.engine.stats(), self.residency)

    async def look(self) -> dict[str, Any]:
        """For people: how busy it is, and its adapters, the latest used first."""
        stats = self.engine.stats()
        on_device = set(stats.adapters_on_device)
        keys = reversed(self.residency.resident_keys)
        return {
            "running": stats.num_running,
            "waiting": stats.num_waiting,
            "kv_tokens_used": stats.kv_tokens_used,
            "kv_tokens_total": stats.kv_tokens_total,
            "adapters": [{"name": key, "tier": "device" if key in on_device else "host"} for key in keys],
            "adapter_bytes": self.residency.resident_bytes,
            "adapter_budget": self.residency.budget_bytes,
        }

    def check_health(self) -> None:
        if not self.runner.is_alive:
            raise RuntimeError(f"the engine has stopped: {self.runner.failure}")

    def _cache_salt(self, job: GenerateJob) -> str:
        """Prompts of different salts share nothing in the cache. A tenant's are its own."""
        name = (job.adapter or "").partition("@")[0] or (self.config.served_name or self.config.base_model)
        tenant = "" if name in self._shared else job.tenant
        return json.dumps([tenant, job.cache_salt]) if tenant or job.cache_salt else ""

    async def _tokens(self, job: GenerateJob, prompts: list[list[int]], adapter_s: float) -> AsyncGenerator[Event]:
        salt, stops = self._cache_salt(job), self._prompts.stop_ids(job)
        ends = self.engine.stop_ids | stops
        requests = [
            Request(uuid.uuid4().hex, ids, job.sampling, job.adapter, job.tenant, job.user, job.priority, stops, salt)
            for ids in prompts
        ]
        started, decode, raw = False, self.engine.tokenizer.decode, self._token_bytes
        streams = self._prompts.streams(job, prompts)
        async with contextlib.aclosing(merged([self.runner.generate(request) for request in requests])) as events:
            async for number, event in events:
                if not started:  # only now: a request that the engine refuses has no beginning
                    yield Started(sum(map(len, prompts)), adapter_s=adapter_s, queue_s=event.queued_s)
                    started = True
                if event.finish_reason == "error":
                    yield Failed("the engine could not finish this answer; try again", 500)
                    return
                if event.finish_reason == "structure":
                    yield TOO_COMPLEX
                    return
                tokens = tokens_of(event, number * job.sampling.n + event.index, decode, raw)
                if job.echo and event.num_completion_tokens == 1 and event.token_id >= 0:
                    tokens = replace(tokens, prompt=echoed(prompts[number], event.prompt_logprobs, decode, raw))
                if job.is_prompt_only:
                    tokens = replace(tokens, num_tokens=0, text="", logprobs=(), finish_reason="length")
                if (stream := streams.get(tokens.index)) is not None:
                    thought, text = split(event, stream, ends)
                    tokens = replace(tokens, thought=thought, text=text)
                yield tokens

    def _pinned(self, job: GenerateJob | EmbedJob) -> contextlib.AbstractAsyncContextManager[None]:
        if job.adapter is None:
            return contextlib.nullcontext()
        return self.residency.pinned(job.adapter, owner=job.tenant or job.user)

    async def _prepare(self, key: str) -> PreparedAdapter:
        """In a thread: decoding goes on while an adapter is fetched, read and checked."""

        def prepare() -> PreparedAdapter:
            directory = hosted_directory(key, self.registry, self.base, self.config.adapters)
            return self.engine.prepare_adapter(key, directory)

        return await asyncio.to_thread(prepare)

    async def _load(self, prepared: Any) -> None:
        await self._ended(lambda: self.engine.load_adapter(prepared))

    async def _unload(self, key: str) -> None:
        await self._ended(lambda: self.engine.unload_adapter(key))

    async def _ended(self, change: Callable[[], Future[None] | None]) -> None:
        going_on = await self.runner.call(change)
        if going_on is not None:
            await asyncio.shield(asyncio.wrap_future(going_on))  # a caller that leaves must not stop it half-way


def failed(error: FtrayError) -> Failed:
    if isinstance(error, AdapterError):
        return Failed(str(error), 400, adapter_failed=True)
    if isinstance(error, RequestError):
        return Failed(str(error), 400, code=error.code, param=error.param)
    return Failed(str(error), 400 if isinstance(error, UserError) else 503)


def groups_within(texts: list[list[int]], max_tokens: int) -> Iterator[list[list[int]]]:
    """In order; a longer text is a group of its own."""
    group: list[list[int]] = []
    for ids in texts:
        if group and sum(map(len, group)) + len(ids) > max_tokens:
            yield group
            group = []
        group.append(ids)
    yield group
