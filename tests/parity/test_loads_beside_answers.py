"""What takes long before an answer can begin (an adapter's load, a schema's compilation) stops no other answer."""

import asyncio
import threading
from dataclasses import replace

import pytest
from tiny import write_peft_adapter, write_tiny_model

from ftray.config import parse_config
from ftray.infer.protocol import SamplingParams, StructuredOutput
from ftray.registry import Registry
from ftray.serve.protocol import Event, Failed, GenerateJob
from ftray.serve.replica.replica import EngineReplica

SLOW = {"an adapter": "prepare_adapter", "a schema": "prepare_structured_output"}
JOBS = {
    "an adapter": GenerateJob([[5, 9, 33]], False, SamplingParams(temperature=0, max_tokens=8), "support@1"),
    "a schema": GenerateJob(
        [[5, 9]], False, SamplingParams(max_tokens=8, structure=StructuredOutput("regex", "(yes|no)")), None
    ),
}
OTHER = GenerateJob([[60, 7, 5]], False, SamplingParams(temperature=0, max_tokens=40, ignore_eos=True), None)


@pytest.fixture
def replica(tmp_path):
    base = write_tiny_model(tmp_path / "base")
    registry = Registry(str(tmp_path / "registry"))
    registry.publish("support", write_peft_adapter(tmp_path / "a", base, rank=8, seed=3), metadata={})
    text = (
        f"kind: serve\nbase_model: {base}\nadapters: {{registry: {registry.location}}}\n"
        "engine: {context_tokens: 128, kv_cache_tokens: 1024}\n"
    )
    replica = EngineReplica(parse_config(text, kind="serve", source="test"))
    yield replica
    replica.close()


async def events_of(replica: EngineReplica, job: GenerateJob) -> list[Event]:
    return [event async for event in replica.generate(job)]


class Held:
    """Stands before one of the engine's methods: who calls it waits until `let_go`."""

    def __init__(self, engine, name: str):
        self._called, self._open, self._method = threading.Event(), threading.Event(), getattr(engine, name)
        setattr(engine, name, self)

    def __call__(self, *arguments):
        self._called.set()
        assert self._open.wait(60)
        return self._method(*arguments)

    async def wait(self) -> None:
        assert await asyncio.to_thread(self._called.wait, 20)

    def let_go(self) -> None:
        self._open.set()


async def goes_on_beside(replica: EngineReplica, what: str, *, patience_s: float) -> bool:
    """Whether an answer that runs already, and one that begins, end while another's beginning is held."""
    held = Held(replica.engine, SLOW[what])
    running = asyncio.create_task(events_of(replica, OTHER))
    slow = asyncio.create_task(events_of(replica, JOBS[what]))
    await held.wait()
    others = [running, asyncio.create_task(events_of(replica, OTHER))]
    done, _ = await asyncio.wait(others, timeout=patience_s)
    held.let_go()
    answers = await asyncio.gather(slow, *others)
    assert [answer[-1].finish_reason in ("stop", "length") for answer in answers] == [True] * 3
    return len(done) == 2


@pytest.mark.parametrize("what", SLOW)
def test_answers_go_on_while_another_gets_ready(replica, what):
    assert asyncio.run(goes_on_beside(replica, what, patience_s=60))


def test_a_schema_is_compiled_once_and_never_in_the_engines_thread(replica, monkeypatch):
    grammars, threads = replica.engine._grammars, []
    compiled = grammars._compile

    def watched(structure):
        threads.append(threading.current_thread().name)
        return compiled(structure)

    monkeypatch.setattr(grammars, "_compile", watched)
    job = JOBS["a schema"]
    for prompts in (job.prompts, [[5, 9 + number] for number in range(30)]):
        asyncio.run(events_of(replica, replace(job, prompts=prompts)))
    assert len(threads) == 2
    assert "ftray-engine" not in threads
    assert not grammars._prepared
    monkeypatch.setattr(replica.engine, "prepare_structured_output", lambda structure, num_requests: None)  # the twin
    asyncio.run(events_of(replica, JOBS["a schema"]))
    assert threads[2] == "ftray-engine"


def test_a_preloaded_version_that_cannot_be_loaded_keeps_no_replica_from_starting(replica, caplog):
    """It may have been good when the endpoint was deployed; a replica that starts anew has the others to serve."""
    store = replica.registry
    directory = store.directory(store.get("support@1"))
    store.publish("foreign", directory, metadata={"base_fingerprint": "0" * 64, "base_model": "other"})
    limits = {"preload": ["ghost@prod", "foreign@1", "support@1"]}
    replica.config = replica.config.model_copy(update={"adapters": replica.config.adapters.model_copy(update=limits)})
    asyncio.run(replica.preload())
    assert replica.residency.resident_keys == ["support@1"]
    reported = [record.getMessage() for record in caplog.records if "adapters.preload" in record.getMessage()]
    assert len(reported) == 2
    assert "ghost@prod: no adapter of that name" in reported[0]
    assert "foreign@1: trained on other" in reported[1]


def test_a_file_that_no_budget_holds_is_not_read(replica, monkeypatch):
    job = JOBS["an adapter"]
    assert not isinstance(asyncio.run(events_of(replica, job))[-1], Failed)  # the twin
    monkeypatch.setattr("ftray.model.adapters.weights.load", None)
    replica.config = replica.config.model_copy(
        update={"adapters": replica.config.adapters.model_copy(update={"host_budget": 10})}
    )
    replica.registry.publish("large", replica.registry.directory(replica.registry.get("support@1")), metadata={})
    (event,) = asyncio.run(events_of(replica, replace(job, adapter="large@1")))
    assert "too many for this endpoint's adapters.host_budget (10)" in event.message


@pytest.mark.parametrize("what", SLOW)
def test_in_the_engines_thread_it_would_stop_them(replica, what, monkeypatch):
    """The twin."""

    async def in_the_engines_thread(function, *arguments):
        return await replica.runner.call(lambda: function(*arguments))

    monkeypatch.setattr("ftray.serve.replica.replica.asyncio.to_thread", in_the_engines_thread)
    monkeypatch.setattr(Held, "wait", lambda self: asyncio.sleep(0.5))
    assert not asyncio.run(goes_on_beside(replica, what, patience_s=0.5))
