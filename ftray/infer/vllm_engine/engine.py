"""The engine for GPUs: vLLM (Kwon et al. 2023, arXiv 2309.06180), with what it leaves open done here.

- A version is loaded under an id, a name and a path that were never used before: vLLM would serve what it remembers of
  an old one, weights or prefix cache, under any of the three.
- It starts as many requests as there is room for, and only of as many adapters as it has slots; the others wait in
  `fair_queue.py`. Left to itself vLLM is first come, first served, and adapters beyond its slots starve.

vLLM runs in a process of its own and is spoken to from an event loop in a thread; `step` takes what has come.
"""
# pyright: reportMissingImports=false

import asyncio
import itertools
import os
import queue
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftray.config.serve import AdaptersConfig, EngineConfig
from ftray.errors import AdapterError, FtrayError, UserError
from ftray.infer.checks import check_request, check_unused
from ftray.infer.fair_queue import FairQueue, FlowKey
from ftray.infer.protocol import EngineStats, Request, StructuredOutput, TokenEvent
from ftray.infer.structure import Grammars
from ftray.infer.text import control_ids
from ftray.infer.vllm_engine.arguments import WORKER_GPUS, linear_shapes, slot_bytes, slots_within, vllm_arguments
from ftray.infer.vllm_engine.outputs import Answering, token_events
from ftray.infer.vllm_engine.sampling import sampling_params
from ftray.model.adapters.weights import check_rank, check_shapes, read_adapter
from ftray.model.base import BaseModel, check_length, generation_stop_ids, load_tokenizer, text_config
from ftray.model.chat import stop_token_ids
from ftray.model.hardware import Hardware

# `step` waits so long for a token before it lets its caller do something else.
MAX_WAIT_S = 0.05
# Requests that may go before one whose adapter waits for a slot.
MAX_PASSED_OVER = 64


@dataclass(frozen=True)
class VllmAdapter:
    key: str
    directory: Path
    num_bytes: int


class VllmEngine:
    def __init__(self, base: BaseModel, hardware: Hardware, config: EngineConfig, adapters: AdaptersConfig):
        check_length(base, config.context_tokens, key="engine.context_tokens")
        self.base = base
        self.config = config
        self.max_rank = adapters.rank_limit
        self.tokenizer = load_tokenizer(base)
        self.vocab_size: int = text_config(base)["vocab_size"]
        self.stop_ids = stop_token_ids(self.tokenizer) | generation_stop_ids(base)
        self._grammars = Grammars(self.tokenizer, vocab_size=self.vocab_size, stop_ids=self.stop_ids)
        self._shapes = linear_shapes(base)
        self._slot_bytes = slot_bytes(self.max_rank, self._shapes, bytes_per_weight=hardware.dtype.itemsize)
        self.num_slots = slots_within(adapters, self._slot_bytes)
        self._waiting: FairQueue[Answering] = FairQueue()
        self._answering: dict[str, Answering] = {}
        self._adapters_in_use: Counter[str] = Counter()
        self._leaving: list[Answering] = []  # cancelled; vLLM may not know yet
        self._loaded: dict[str, tuple[Any, VllmAdapter]] = {}
        self._ids = itertools.count(1)
        self._paths = tempfile.TemporaryDirectory(prefix="ftray-adapters-")
        self._outputs: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._num_running = self._prompt_tokens = self._prompt_tokens_cached = 0
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="ftray-vllm", daemon=True).start()
        arguments = vllm_arguments(base, hardware, config, num_slots=self.num_slots, max_rank=self.max_rank)
        self._llm: Any = self._in_loop(start_vllm(arguments)).result()
        blocks = None if "num_gpu_blocks_override" in arguments else self._llm.vllm_config.cache_config.num_gpu_blocks
        self._kv_tokens = config.kv_cache_tokens if blocks is None else blocks * arguments["block_size"]

    # -- requests ------------------------------------------------------------------------------------------------

    def prepare_structured_output(self, structure: StructuredOutput, num_requests: int = 1) -> None:
        self._grammars.prepare(structure, num_requests)

    def add(self, request: Request) -> None:
        max_tokens = check_request(
            request, context_tokens=self.config.context_tokens, vocab_size=self.vocab_size, loaded=self._loaded
        )
        if request.sampling.prompt_logprobs is not None:
            # Beside adapters it ends the whole engine: the head's adapter layer expects a row for each sequence (0.32).
            raise UserError("logprobs of the prompt (echo) end vLLM where adapters are served; use engine.type: torch")
        if request.sampling.structure is not None:
            self._grammars.matcher(request.sampling.structure)  # refused here rather than in the other process
        lora = self._loaded[request.adapter][0] if request.adapter is not None else None
        own_stops = control_ids(self.tokenizer, request.sampling.stop)
        stop_ids = own_stops if request.sampling.ignore_eos else own_stops | self.stop_ids | request.stop_ids
        answering = Answering(request, sampling_params(request.sampling, max_tokens, stop_ids), lora)
        self._answering[request.id] = answering
        self._waiting.push(answering.request.flow, answering, weight=answering.request.priority)
        self._start_waiting()

    def cancel(self, request_id: str) -> None:
        answering = self._answering.pop(request_id, None)
        if answering is None:
            return
        if not answering.started:
            self._waiting.remove(answering.request.flow, answering)
        else:
            self._loop.call_soon_threadsafe(lambda: answering.task.cancel())
            self._leaving = [other for other in self._leaving if not other.task or not other.task.done()] + [answering]
            self._ended(answering)
        self._start_waiting()

    @property
    def has_work(self) -> bool:
        return bool(self._answering)

    def step(self) -> list[TokenEvent]:
        events: list[TokenEvent] = []
        try:
            name, output = self._outputs.get(timeout=MAX_WAIT_S)
            while True:
                events += self._events(name, output)
                name, output = self._outputs.get_nowait()
        except queue.Empty:
            pass
        self._start_waiting()
        return events

    def _start_waiting(self) -> None:
        while self._num_running < self.config.max_sequences and (found := self._next()) is not None:
            flow, answering = found
            self._waiting.start(flow)
            self._num_running += answering.request.sampling.n
            if answering.request.adapter is not None:
                self._adapters_in_use[answering.request.adapter] += 1
            answering.started = True
            answering.queued_s = time.monotonic() - answering.added_at
            self._loop.call_soon_threadsafe(self._begin, answering)

    def _next(self) -> tuple[FlowKey, Answering] | None:
        waiting_for_slots: list[Answering] = []
        is_starved = False  # one of them: beside it nobody takes or keeps a slot; the base needs none
        for flow, answering in self._waiting.in_order():
            if self._num_running and self._num_running + answering.request.sampling.n > self.config.max_sequences:
                return None  # whoever is next must not be passed over by smaller ones for ever
            adapter = answering.request.adapter
            has_slot = adapter in self._adapters_in_use or len(self._adapters_in_use) < self.num_slots
            if adapter is None or (has_slot and not is_starved):
                for other in waiting_for_slots:
                    other.passed_over += adapter is not None
                return flow, answering
            if not has_slot:
                waiting_for_slots.append(answering)
                is_starved |= answering.passed_over >= MAX_PASSED_OVER
        return None

    def _begin(self, answering: Answering) -> None:
        answering.task = self._loop.create_task(self._follow(answering))

    async def _follow(self, answering: Answering) -> None:
        request = answering.request
        prompt: dict[str, Any] = {"prompt_token_ids": list(request.prompt_ids)}
        if request.cache_salt:
            prompt["cache_salt"] = request.cache_salt
        try:
            async for output in self._llm.generate(prompt, answering.params, request.id, lora_request=answering.lora):
                self._outputs.put((request.id, output))
        except Exception as error:  # noqa: BLE001  told by `step`
            self._outputs.put((request.id, error))

    def _events(self, name: str, output: Any) -> Iterator[TokenEvent]:
        answering = self._answering.get(name)
        if answering is None:  # cancelled
            return
        if isinstance(output, Exception):
            if self._llm.errored:
                raise FtrayError(f"vLLM has stopped: {output}") from output
            del self._answering[name]
            self._ended(answering)
            yield TokenEvent(name, -1, "", 0, "error")
            return
        cached = output.num_cached_tokens or 0
        if not answering.num_generated:
            self._prompt_tokens += len(answering.request.prompt_ids)
            self._prompt_tokens_cached += cached
            self._waiting.charge(answering.request.flow, len(answering.request.prompt_ids) - cached)
        self._waiting.charge(answering.request.flow, sum(len(part.token_ids) for part in output.outputs))
        num_ended = sum(part.finish_reason is not None for part in output.outputs)
        answering.num_ended += num_ended
        self._num_running -= num_ended
        if output.finished:
            del self._answering[name]
            self._ended(answering)
        for part in output.outputs:
            yield from token_events(answering, part, cached)

    def _ended(self, answering: Answering) -> None:
        self._num_running -= answering.request.sampling.n - answering.num_ended
        self._waiting.stop(answering.request.flow)
        adapter = answering.request.adapter
        if adapter is not None:
            self._adapters_in_use[adapter] -= 1
            if not self._adapters_in_use[adapter]:
                del self._adapters_in_use[adapter]

    # -- adapters ------------------------------------------------------------------------------------------------

    def prepare_adapter(self, key: str, directory: Path) -> VllmAdapter:
        adapter = read_adapter(directory, label=key)
        check_rank(adapter, self.max_rank, label=key)
        check_shapes(adapter.linear, self._shapes, label=key)
        return VllmAdapter(key, directory.absolute(), adapter.num_bytes)

    def load_adapter(self, prepared: VllmAdapter) -> Future[None]:
        old = self.unload_adapter(prepared.key) if prepared.key in self._loaded else None
        return self._in_loop(self._bring(prepared, old))

    async def _bring(self, prepared: VllmAdapter, old: Future[None] | None) -> None:
        """Once what had its key is gone."""
        from vllm.lora.request import LoRARequest

        if old is not None:
            await asyncio.wrap_future(old)
        number = next(self._ids)
        path = Path(self._paths.name) / str(number)
        path.symlink_to(prepared.directory, target_is_directory=True)
        lora = LoRARequest(f"{prepared.key}#{number}", number, str(path))
        try:
            await self._llm.add_lora(lora)
        except Exception as error:
            path.unlink()
            if self._llm.errored:
                raise
            raise AdapterError(f"{prepared.key}: vLLM cannot host it: {error}") from None
        self._loaded[prepared.key] = lora, prepared

    def unload_adapter(self, key: str) -> Future[None]:
        check_unused(key, (answering.request for answering in self._answering.values()))
        lora, _ = self._loaded.pop(key)
        return self._in_loop(self._remove(lora, [other for other in self._leaving if other.lora is lora]))

    async def _remove(self, lora: Any, leaving: list[Answering]) -> None:
        """Once vLLM has let go of its cancelled requests."""
        await asyncio.gather(*(answering.task for answering in leaving), return_exceptions=True)
        await self._llm.remove_lora(lora.lora_int_id)
        Path(lora.lora_path).unlink()

    def embed(self, texts: Any, adapter: str | None) -> Any:
        raise UserError("engine.type: vllm generates text here; embeddings need engine.type torch")

    # -- looking -------------------------------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        from vllm.v1.metrics.reader import get_metrics_snapshot

        loaded, in_use = dict(self._loaded), list(self._adapters_in_use)  # copies: another thread may ask
        reported: dict[str, Any] = {metric.name: metric for metric in get_metrics_snapshot()}
        used, preempted = (reported[f"vllm:{name}"].value for name in ("kv_cache_usage_perc", "num_preemptions"))
        return EngineStats(
            num_running=self._num_running,
            num_waiting=sum(a.request.sampling.n for a in list(self._answering.values()) if not a.started),
            num_preemptions=int(preempted),
            kv_tokens_used=round(used * self._kv_tokens),
            kv_tokens_total=self._kv_tokens,
            prompt_tokens=self._prompt_tokens,
            prompt_tokens_cached=self._prompt_tokens_cached,
            adapters=tuple(loaded),
            adapters_on_device=tuple(in_use),
            device_adapter_bytes=len(in_use) * self._slot_bytes,
        )

    def close(self) -> None:
        async def shut_down() -> None:
            self._llm.shutdown()
            begun = asyncio.all_tasks() - {asyncio.current_task()}
            for task in begun:
                task.cancel()
            await asyncio.gather(*begun, return_exceptions=True)

        self._in_loop(shut_down()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._paths.cleanup()

    def _in_loop(self, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)


async def start_vllm(arguments: dict[str, Any]) -> Any:
    os.environ["VLLM_RAY_PER_WORKER_GPUS"] = WORKER_GPUS
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
