"""The endpoint's parts without ray: the API over a fake backend, the engine's thread, and adapter residency."""

import asyncio
import json
from dataclasses import dataclass

import pytest
from fake_endpoint import ask, make_client

from ftray.errors import AdapterError, FtrayError, UserError
from ftray.infer.protocol import EngineStats, Request, TokenEvent
from ftray.model.adapters.directory import check_base
from ftray.registry import Registry
from ftray.serve.http.ingress import Ingress
from ftray.serve.protocol import Failed
from ftray.serve.replica.engine_thread import EngineRunner
from ftray.serve.replica.fair_semaphore import FairSemaphore
from ftray.serve.replica.popularity import Traffic
from ftray.serve.replica.prefetch import Prefetcher
from ftray.serve.replica.residency import AdapterResidency
from ftray.serve.routing.model_names import ModelNames
from ftray.serve.tenants.auth import Authenticator


@pytest.fixture
def client(registry, backend):
    return make_client(Ingress(ModelNames("base-model", registry), backend, Authenticator(None)))


@pytest.mark.parametrize(
    ("name", "answered_by"),
    [
        ("base-model", "base-model"),
        ("support", "support@2"),
        ("support@prod", "support@2"),
        ("support@canary", "support@3"),
        ("support@1", "support@1"),
    ],
)
def test_the_name_chooses_base_version_or_alias(client, backend, name, answered_by):
    answer = ask(client, name).json()
    assert answer["model"] == answered_by
    assert backend.jobs[0].adapter == (None if name == "base-model" else answered_by)
    assert answer["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 2,
        "total_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_all_names_are_listed(client):
    names = [entry["id"] for entry in client.get("/v1/models").json()["data"]]
    assert names == ["base-model", "support", "support@canary", "support@prod", "support@1", "support@2", "support@3"]


def test_an_unknown_model_is_404_with_the_near_names(client):
    response = ask(client, "suport@prod")
    assert response.status_code == 404
    error = response.json()["error"]
    assert error["code"] == "model_not_found"
    assert "support@prod" in error["message"]
    for name in ("../etc/passwd", "support@99", "", "support@prod@1", "a/b"):
        assert ask(client, name).status_code == 404


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 3}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 0}, "n: "),
        ({"frequency_penalty": 3}, "frequency_penalty"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty"),
        ({"response_format": {"type": "json_schema"}}, "json_schema"),
        ({"response_format": {"type": "regex", "json_schema": {"name": "x", "schema": {}}}}, "do not go together"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs"),
        ({"functions": [{"name": "x"}]}, "functions: this endpoint has no such parameter"),
        ({"tool_choice": "required"}, "tool_choice needs tools"),
        ({"messages": []}, "messages"),
        ({"logprobs": 7}, "logprobs"),
    ],
)
def test_what_the_endpoint_cannot_do_is_refused_by_name(client, change, message):
    response = ask(client, "base-model", **change)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert message in response.json()["error"]["message"]


def test_errors_of_the_engine_have_openais_shape_streaming_or_not(client, backend):
    backend.error = Failed("too long", 400)
    for stream in (False, True):
        response = ask(client, "base-model", stream=stream)
        assert response.status_code == 400
        assert response.json()["error"]["message"] == "too long"
    backend.error = Failed("busy", 429)
    response = ask(client, "base-model")
    assert response.status_code == 429
    assert response.headers["retry-after"] == "1"


def test_streaming_chunks(client):
    response = ask(client, "support", stream=True, stream_options={"include_usage": True})
    lines = [line for line in response.text.splitlines() if line]
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert [c["choices"][0]["delta"].get("content") for c in chunks[:-1]] == ["I am ", "support@2"]
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] == 5


def test_several_answers_and_their_logprobs(client):
    whole = ask(client, "support", n=2, logprobs=True, top_logprobs=2).json()
    assert [choice["index"] for choice in whole["choices"]] == [0, 1]
    reported = whole["choices"][1]["logprobs"]["content"][0]
    assert reported["token"] == "I"
    assert reported["bytes"] == [73]
    assert [top["bytes"] for top in reported["top_logprobs"]] == [[73], [0xE2, 0x82]]  # half a character
    response = ask(client, "support", n=2, stream=True)
    chunks = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    assert [c["choices"][0]["index"] for c in chunks] == [0, 0, 1, 1]
    assert [("role" in c["choices"][0]["delta"]) for c in chunks] == [True, False, True, False]
    body = {"model": "support", "prompt": "hi", "logprobs": 2}
    choice = client.post("/v1/completions", json=body).json()["choices"][0]
    assert choice["logprobs"]["top_logprobs"] == [{"I": -0.5, "\ufffd": -1.0}] * 2


def test_what_a_request_asks_of_the_sampler(client, backend):
    ask(
        client,
        "base-model",
        top_k=3,
        min_p=0.1,
        repetition_penalty=1.1,
        logit_bias={"7": -100},
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "integer"}}},
        user="team-a",
    )
    sampling = backend.jobs[0].sampling
    assert (sampling.top_k, sampling.min_p, sampling.repetition_penalty) == (3, 0.1, 1.1)
    assert sampling.logit_bias == {7: -100}
    assert sampling.structure.text == '{"type": "integer"}'
    assert (backend.jobs[0].user, backend.jobs[0].tenant) == ("team-a", "")  # who can say any name is no tenant


def test_an_adapter_of_another_base_is_refused_naming_both(tiny_base):
    check_base("a@1", {"base_fingerprint": tiny_base.fingerprint}, tiny_base)
    check_base("a@1", {}, tiny_base)  # a foreign PEFT directory carries none; its shapes are checked at load
    with pytest.raises(AdapterError, match=r"a@1: trained on qwen3-8b .* this endpoint serves .*tiny"):
        check_base("a@1", {"base_fingerprint": "0" * 64, "base_model": "qwen3-8b"}, tiny_base)


# -- residency -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prepared:
    key: str
    num_bytes: int


class Loader:
    """Where adapters of a fixed size go; counts the loads."""

    def __init__(self, num_bytes: int = 40):
        self.num_bytes = num_bytes
        self.loads: list[str] = []
        self.resident: set[str] = set()
        self.fail_next = False

    async def prepare(self, key: str) -> Prepared:
        self.loads.append(key)
        await asyncio.sleep(0.01)
        if self.fail_next:
            self.fail_next = False
            raise UserError("broken file")
        return Prepared(key, self.num_bytes)

    async def load(self, prepared: Prepared) -> None:
        self.resident.add(prepared.key)

    async def unload(self, key: str) -> None:
        self.resident.remove(key)


async def touch(residency: AdapterResidency, key: str, *, owner: str = "") -> None:
    async with residency.pinned(key, owner=owner):
        pass


def test_one_load_in_flight_per_version():
    async def scenario():
        loader = Loader()
        residency = AdapterResidency(loader.prepare, loader.load, loader.unload, budget_bytes=100)

        async def use():
            async with residency.pinned("a@1"):
                assert "a@1" in loader.resident

        await asyncio.gather(*(use() for _ in range(20)))
        assert loader.loads == ["a@1"]

    asyncio.run(scenario())


def test_least_recently_used_goes_first_and_never_a_pinned_one():
    async def scenario():
        loader = Loader()
        residency = AdapterResidency(loader.prepare, loader.load, loader.unload, budget_bytes=100)

        async with residency.pinned("a@1"):
            await touch(residency, "b@1")
            await touch(residency, "c@1")
            assert loader.resident == {"a@1", "c@1"}  # a is older, but in use
            await touch(residency, "d@1")
            assert loader.resident == {"a@1", "d@1"}
        await touch(residency, "e@1")
        assert loader.resident == {"d@1", "e@1"}
        assert residency.resident_bytes == 80

    asyncio.run(scenario())


def test_the_budget_holds_while_all_are_in_use():
    """Forty requests for forty adapters: they come in as others leave, and memory never holds more than two."""

    async def scenario():
        loader = Loader()
        residency = AdapterResidency(loader.prepare, loader.load, loader.unload, budget_bytes=100)
        most = 0

        async def use(key):
            nonlocal most
            async with residency.pinned(key):
                await asyncio.sleep(0.001)
                most = max(most, len(loader.resident))

        await asyncio.gather(*(use(f"a{i}@1") for i in range(40)))
        assert most == 2
        assert len(loader.loads) == 40

    asyncio.run(scenario())


@pytest.mark.parametrize("patience_s", [0.02, None], ids=["", "twin"])
def test_requests_that_overlap_without_end_do_not_keep_another_adapter_out(patience_s):
    """A flood on the one adapter that memory holds: always a request of it is in flight."""

    async def scenario():
        loader = Loader(num_bytes=80)
        residency = AdapterResidency(
            loader.prepare, loader.load, loader.unload, budget_bytes=100, patience_s=patience_s or 3600
        )
        over = False

        async def flood(begin_s):
            await asyncio.sleep(begin_s)
            while not over:
                async with residency.pinned("flood@1"):
                    await asyncio.sleep(0.01)

        async def use(key):
            async with residency.pinned(key):
                return set(loader.resident)

        floods = [asyncio.create_task(flood(number * 0.003)) for number in range(3)]
        await asyncio.sleep(0.05)
        try:
            return await asyncio.wait_for(use("light@1"), 1)
        except TimeoutError:
            return None
        finally:
            over = True
            await asyncio.gather(*floods)
            assert await use("flood@1") == {"flood@1"}  # it comes back

    assert asyncio.run(scenario()) == ({"light@1"} if patience_s is not None else None)


def test_nobody_has_to_go_for_a_prefetch():
    async def scenario():
        loader = Loader(num_bytes=80)
        residency = AdapterResidency(loader.prepare, loader.load, loader.unload, budget_bytes=100, patience_s=0.02)
        async with residency.pinned("a@1"):
            with pytest.raises(FtrayError, match="every adapter in memory is in use"):
                await asyncio.wait_for(residency.prefetch("b@1"), 5)
            async with asyncio.timeout(5), residency.pinned("a@1"):
                assert loader.resident == {"a@1"}
        assert not residency._bad  # there is nothing wrong with it
        await residency.prefetch("b@1")
        assert loader.resident == {"b@1"}

    asyncio.run(scenario())


class Sizes(Loader):
    def __init__(self, **num_bytes: int):
        super().__init__()
        self.sizes = num_bytes
        self.unloads: list[str] = []

    async def unload(self, key: str) -> None:
        await super().unload(key)
        self.unloads.append(key)

    async def prepare(self, key: str) -> Prepared:
        return Prepared(key, self.sizes[key])


def gone_for_a_large_adapter() -> list[str]:
    """Requests of a crawler for `a` and `b` overlap without end, a person has one for `c` at a time; then the crawler
    wants `large`. What had to go."""

    async def scenario():
        loader = Sizes(a=40, b=40, c=20, large=80)
        residency = AdapterResidency(loader.prepare, loader.load, loader.unload, budget_bytes=100, patience_s=0.02)
        over = False

        async def flood(key, owner, begin_s):
            await asyncio.sleep(begin_s)
            while not over:
                async with residency.pinned(key, owner=owner):
                    await asyncio.sleep(0.01)

        floods = [asyncio.create_task(flood(key, "crawler", n * 0.003)) for n in range(3) for key in ("a", "b")]
        floods.append(asyncio.create_task(flood("c", "person", 0)))
        await asyncio.sleep(0.05)

        async def use():
            async with residency.pinned("large", owner="crawler"):
                return list(loader.unloads)

        try:
            return await asyncio.wait_for(use(), 5)
        finally:
            over = True
            await asyncio.wait_for(asyncio.gather(*floods), 5)

    return asyncio.run(scenario())


def test_room_for_a_large_adapter_is_made_of_several_and_not_of_a_light_tenants_only_one(monkeypatch):
    assert sorted(gone_for_a_large_adapter()) == ["a", "b"]

    def with_fewest_requests(residency):
        return min((key for key in residency.resident_keys if residency.is_resident(key)), key=residency.num_pins)

    monkeypatch.setattr(AdapterResidency, "_least_wanted", with_fewest_requests)  # the twin
    assert gone_for_a_large_adapter()[0] == "c"


def loads_beside_a_crowd(count: int, key: str, *, owner: str) -> list[str]:
    """One owner asks for so many adapters, a0@1 and on, at once, then `owner` for one. The loads in their order."""

    async def scenario():
        loader = Loader(num_bytes=1)
        residency = AdapterResidency(loader.prepare, loader.load, loader.unload, budget_bytes=1000)
        crowd = [asyncio.create_task(touch(residency, f"a{n}@1", owner="crawler")) for n in range(count)]
        await asyncio.sleep(0)
        await asyncio.gather(touch(residency, key, owner=owner), *crowd)
        return loader.loads

    return asyncio.run(scenario())


def order_of_turns(*, leaving: bool) -> list[str]:
    """Of one at a time: twenty of a crawler, then one of a person; the first ten may leave before their turn."""

    async def scenario():
        turns, order = FairSemaphore(1), []

        async def take(name, owner):
            async with turns.one(owner):
                await asyncio.sleep(0)
                order.append(name)

        crowd = [asyncio.create_task(take(f"{number}", "crawler")) for number in range(20)]
        await asyncio.sleep(0)
        person = asyncio.create_task(take("person", "person"))
        for task in crowd[:10] if leaving else []:
            task.cancel()
        await asyncio.wait_for(asyncio.gather(person, *crowd, return_exceptions=True), 5)
        return order

    return asyncio.run(scenario())


def test_owners_take_turns_and_who_leaves_holds_nobody_up():
    assert order_of_turns(leaving=False).index("person") <= 3
    assert len(order_of_turns(leaving=True)) == 11


def test_a_hundred_cold_adapters_of_one_tenant_do_not_keep_the_one_of_another_waiting():
    fair, twin = (loads_beside_a_crowd(100, "light@1", owner=owner) for owner in ("person", "crawler"))
    assert len(fair) == len(twin) == 101
    assert fair.index("light@1") <= 3
    assert twin.index("light@1") == 100  # nobody takes turns with himself


def test_whose_turn_is_first_brings_the_adapter_in_for_both():
    loads = loads_beside_a_crowd(50, "a49@1", owner="person")
    assert loads.index("a49@1") <= 3
    assert len(loads) == 50


def test_loads_nobody_waits_for_any_more_are_not_begun():
    async def scenario():
        loader = Loader(num_bytes=1)
        residency = AdapterResidency(loader.prepare, loader.load, loader.unload, budget_bytes=1000)
        crowd = [asyncio.create_task(touch(residency, f"a{number}@1")) for number in range(50)]
        await asyncio.sleep(0)
        for client in crowd:
            client.cancel()
        await asyncio.gather(*crowd, return_exceptions=True)
        await touch(residency, "later@1")
        assert loader.loads == ["a0@1", "a1@1", "later@1"]  # two were under way
        assert set(residency.resident_keys) == {"a0@1", "a1@1", "later@1"}
        await touch(residency, "a7@1")  # and what was abandoned can be asked for again

    asyncio.run(scenario())


def test_an_adapter_that_could_not_be_loaded_is_not_brought_in_unasked():
    async def scenario():
        loader = Loader()
        residency = AdapterResidency(loader.prepare, loader.load, loader.unload, budget_bytes=100)

        for _ in range(5):
            loader.fail_next = True
            with pytest.raises(UserError):
                await touch(residency, "bad@1")
        for _ in range(4):
            residency.traffic.note("good@1")
        assert residency.worth_prefetching() == "good@1"
        await touch(residency, "bad@1")  # it was the store
        assert residency.resident_keys == ["bad@1"]

    asyncio.run(scenario())


def test_a_promoted_version_is_brought_in_where_its_name_is_used(tmp_path):
    async def scenario():
        loader = Loader()
        residency = AdapterResidency(loader.prepare, loader.load, loader.unload, budget_bytes=1000)
        registry = Registry(str(tmp_path / "registry"))
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "adapter_config.json").write_text("{}")
        for name in ("used", "used", "unused", "unused"):
            registry.publish(name, tmp_path / "a", metadata={})
        registry.promote("used@1", "prod")
        prefetcher = Prefetcher(registry, residency)
        await prefetcher.look()
        assert loader.loads == []
        async with residency.pinned("used@1"):
            pass
        other_process = Registry(str(tmp_path / "registry"))
        for name in ("used", "unused"):
            other_process.promote(f"{name}@2", "prod")
        await prefetcher.look()
        await prefetcher.look()
        assert loader.loads == ["used@1", "used@2"]

    asyncio.run(scenario())


def test_a_store_that_is_down_at_the_start_is_followed_later(monkeypatch):
    class Journal:
        entries, down = [], 2

        def refresh(self):
            if self.down:
                self.down -= 1
                raise FtrayError("down")
            return self

    async def scenario():
        journal, residency = Journal(), AdapterResidency(None, None, None, budget_bytes=1)
        following = asyncio.create_task(Prefetcher(journal, residency).follow())
        await asyncio.wait([following], timeout=0.5)
        assert not following.done()
        assert journal.down == 0
        following.cancel()

    monkeypatch.setattr("ftray.serve.replica.prefetch.POLL_S", 0.01)
    asyncio.run(scenario())


def test_an_entry_that_nobody_can_read_does_not_end_the_prefetching(monkeypatch, caplog):
    class Journal:
        looks = 0

        def refresh(self):
            self.looks += 1
            raise json.JSONDecodeError("no JSON", "", 0)

    async def scenario():
        journal, residency = Journal(), AdapterResidency(None, None, None, budget_bytes=1)
        following = asyncio.create_task(Prefetcher(journal, residency).follow())
        await asyncio.wait([following], timeout=0.5)
        assert not following.done()
        assert journal.looks > 1
        following.cancel()

    monkeypatch.setattr("ftray.serve.replica.prefetch.POLL_S", 0.01)
    asyncio.run(scenario())
    assert "journal cannot be read" in caplog.text


def test_hot_adapters_come_back_after_a_flood_and_only_they(tmp_path):
    async def scenario():
        now = 0.0
        loader = Loader()
        residency = AdapterResidency(loader.prepare, loader.load, loader.unload, budget_bytes=100)
        residency.traffic = Traffic(clock=lambda: now)
        prefetcher = Prefetcher(Registry(str(tmp_path / "registry")), residency)

        async def ask(key):
            async with residency.pinned(key):
                pass

        for _ in range(4):
            await ask("hot@1")
        for i in range(6):  # each once
            await ask(f"flood{i}@1")
        assert loader.resident == {"flood4@1", "flood5@1"}
        await prefetcher.return_hottest()
        assert loader.resident == {"flood5@1", "hot@1"}
        num_loads = len(loader.loads)
        await prefetcher.return_hottest()  # the next hottest is no hotter than what is here
        assert len(loader.loads) == num_loads
        await ask("flood0@1")
        await ask("flood1@1")
        now = 1000.0  # and what was asked for long ago is no reason
        await prefetcher.return_hottest()
        assert "hot@1" not in loader.resident

    asyncio.run(scenario())


def test_an_adapter_over_the_whole_budget_is_refused():
    async def scenario():
        loader = Loader(num_bytes=101)
        residency = AdapterResidency(loader.prepare, loader.load, loader.unload, budget_bytes=100)
        with pytest.raises(AdapterError, match=r"a@1: takes 101 bytes, over this endpoint's adapters\.host_budget"):
            async with residency.pinned("a@1"):
                pass

    asyncio.run(scenario())


def test_a_failed_load_is_told_to_all_and_tried_again():
    async def scenario():
        loader = Loader()
        loader.fail_next = True
        residency = AdapterResidency(loader.prepare, loader.load, loader.unload, budget_bytes=100)

        async def use():
            async with residency.pinned("a@1"):
                return "fine"

        results = await asyncio.gather(*(use() for _ in range(3)), return_exceptions=True)
        assert all(isinstance(result, UserError) for result in results)
        assert await use() == "fine"

    asyncio.run(scenario())


def test_a_load_that_fails_after_everybody_left_is_forgotten():
    async def scenario():
        loader = Loader()
        loader.fail_next = True
        residency = AdapterResidency(loader.prepare, loader.load, loader.unload, budget_bytes=50)

        async def use(key):
            async with residency.pinned(key):
                return "fine"

        left = asyncio.create_task(use("a@1"))
        await asyncio.sleep(0.001)
        left.cancel()
        await asyncio.sleep(0.03)
        assert residency.resident_keys == []
        assert await use("b@1") == "fine"  # and room is not made by unloading what never came
        assert await use("a@1") == "fine"

    asyncio.run(scenario())


# -- the engine's thread -------------------------------------------------------------------------------------------


class CountingEngine:
    """A fake Engine: request `id` gets max_tokens tokens 0, 1, 2, ..."""

    def __init__(self):
        self.left: dict[str, int] = {}
        self.done: dict[str, int] = {}
        self.break_next = False
        self.cancelled: list[str] = []

    def add(self, request: Request) -> None:
        if not request.prompt_ids:
            raise UserError("the prompt is empty")
        self.left[request.id] = request.sampling.max_tokens or 3
        self.done[request.id] = 0

    def step(self) -> list[TokenEvent]:
        if self.break_next:
            raise RuntimeError("out of memory")
        events = []
        for name in list(self.left):
            self.done[name] += 1
            self.left[name] -= 1
            reason = None if self.left[name] else "length"
            events.append(TokenEvent(name, self.done[name] - 1, "x", self.done[name], reason))
            if reason:
                del self.left[name]
        return events

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)
        self.left.pop(request_id, None)

    @property
    def has_work(self) -> bool:
        return bool(self.left)

    def prepare_adapter(self, key, directory) -> Prepared:
        return Prepared(key, 0)

    def load_adapter(self, prepared) -> None: ...

    def unload_adapter(self, key) -> None: ...

    def stats(self) -> EngineStats:
        return EngineStats(0, 0, 0, 0, 0, 0, 0, (), (), 0)


def run_scenario(scenario):
    engine = CountingEngine()
    runner = EngineRunner(engine)
    try:
        asyncio.run(scenario(engine, runner))
    finally:
        runner.close()


def test_streams_do_not_mix():
    async def scenario(engine, runner):
        async def collect(name):
            return [event.request_id async for event in runner.generate(Request(name, [1]))]

        results = await asyncio.gather(*(collect(f"r{i}") for i in range(8)))
        assert results == [[f"r{i}"] * 3 for i in range(8)]

    run_scenario(scenario)


def test_a_refused_request_raises_where_it_was_asked():
    async def scenario(engine, runner):
        with pytest.raises(UserError, match="empty"):
            async for _ in runner.generate(Request("a", [])):
                pass

    run_scenario(scenario)


def test_a_closed_engine_answers_nobody_and_keeps_nobody_waiting():
    async def scenario():
        runner = EngineRunner(CountingEngine())
        await asyncio.to_thread(runner.close)
        with pytest.raises(FtrayError, match="it was closed"):
            await asyncio.wait_for(runner.call(lambda: None), timeout=5)

    asyncio.run(scenario())


def test_who_waits_for_tokens_of_an_engine_that_is_closed_is_told():
    async def scenario(engine, runner):
        from ftray.infer.protocol import SamplingParams

        stream = runner.generate(Request("a", [1], SamplingParams(max_tokens=10**9)))
        await anext(stream)
        await asyncio.to_thread(runner.close)
        with pytest.raises(FtrayError, match="it was closed"):
            await asyncio.wait_for(drain(stream), timeout=5)

    run_scenario(scenario)


async def drain(stream) -> None:
    async for _ in stream:
        pass


def test_leaving_early_cancels():
    async def scenario(engine, runner):
        from ftray.infer.protocol import SamplingParams

        stream = runner.generate(Request("a", [1], SamplingParams(max_tokens=10**9)))
        await anext(stream)
        await stream.aclose()
        await runner.call(lambda: None)
        assert engine.cancelled == ["a"]
        assert not engine.has_work

    run_scenario(scenario)


def test_a_broken_engine_is_told_to_everybody():
    async def scenario(engine, runner):
        engine.break_next = True
        with pytest.raises(FtrayError, match="out of memory"):
            async for _ in runner.generate(Request("a", [1])):
                pass
        with pytest.raises(FtrayError, match="the engine has stopped"):
            await runner.call(lambda: None)

    run_scenario(scenario)
