"""Who is computed next: pages, fair queues, adapter slots, and the scheduler over them."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ftray.config.serve import EngineConfig
from ftray.errors import AdapterError
from ftray.infer.fair_queue import FairQueue
from ftray.infer.protocol import Request, SamplingParams
from ftray.infer.torch_engine.kv_cache import PagePool, page_name
from ftray.infer.torch_engine.lora.batch import matmul_runs
from ftray.infer.torch_engine.lora.slots import AdapterSlots, Factors, HostAdapter, Segment
from ftray.infer.torch_engine.scheduler import Scheduler
from ftray.infer.torch_engine.sequence import Sequence
from ftray.infer.torch_engine.slot_rotation import MIN_STEPS
from ftray.infer.torch_engine.starvation import MAX_STEPS_CROWDED_OUT, StarvationPolicy
from ftray.infer.vllm_engine.engine import MAX_PASSED_OVER, VllmEngine
from ftray.infer.vllm_engine.outputs import Answering

# -- pages -------------------------------------------------------------------------------------------------------------


def test_pages_are_shared_kept_and_given_up_least_recently_used_first():
    pool = PagePool(4)  # page 0 is padding
    first, second, third = (pool.allocate() for _ in range(3))
    assert pool.allocate() is None
    names = [page_name(b"base", range(16)), page_name(b"base", range(16, 32))]
    pool.name(first, names[0])
    pool.name(second, names[1])
    pool.share(first)
    pool.release([first, second])
    assert pool.num_used == 2  # the first has another user, the third was never released
    assert pool.find(names[1]) == second
    pool.release([first, third])
    assert pool.num_available == 3
    assert pool.allocate() == third  # the one without a name
    assert pool.allocate() == second  # kept for its name, unused the longest
    assert pool.find(names[1]) is None
    assert pool.find(names[0]) == first


def test_page_names_depend_on_tokens_on_what_came_before_and_on_the_salt():
    names = {page_name(salt, tokens) for salt in (b"base", b"1 a@1", b"2 a@1") for tokens in (range(16), range(1, 17))}
    assert len(names) == 6
    assert page_name(b"base", range(16)) == page_name(b"base", list(range(16)))


# -- fair queues ---------------------------------------------------------------------------------------------------


def serve(queue: FairQueue, costs: dict[tuple[str, str], int], rounds: int) -> list[tuple[str, str]]:
    """One place: each item runs to its end before the next."""
    served = []
    for _ in range(rounds):
        key, _ = next(queue.in_order())
        queue.start(key)
        queue.charge(key, costs[key])
        queue.stop(key)
        served.append(key)
    return served


def test_flows_share_tokens_not_requests():
    queue: FairQueue[int] = FairQueue()
    long, short = ("", "long@1"), ("", "short@1")
    for i in range(400):
        queue.push(long, i)
        queue.push(short, i)
    served = serve(queue, {long: 900, short: 100}, 300)
    tokens = {long: served.count(long) * 900, short: served.count(short) * 100}
    assert tokens[long] == pytest.approx(tokens[short], rel=0.1)


@pytest.mark.parametrize("priority", [1, 3])
def test_a_flow_of_more_priority_gets_so_many_times_the_tokens(priority):
    """Of one tenant's adapters, and among tenants."""
    for first, second in ((("t", "a@1"), ("t", "b@1")), (("s", "a@1"), ("t", "a@1"))):
        queue: FairQueue[int] = FairQueue()
        for i in range(400):
            queue.push(first, i, weight=priority)
            queue.push(second, i)
        served = serve(queue, {first: 100, second: 100}, 300)
        assert served.count(first) == pytest.approx(priority * served.count(second), rel=0.1)


def test_a_late_light_flow_goes_first_and_a_heavy_one_is_not_punished_for_having_been_alone():
    queue: FairQueue[int] = FairQueue()
    heavy, light = ("crawler", ""), ("person", "")
    for i in range(100):
        queue.push(heavy, i)
    serve(queue, {heavy: 500}, 50)
    queue.push(light, 0)
    order = serve(queue, {heavy: 500, light: 500}, 4)
    assert light in order[:2]
    assert order.count(heavy) == 3


def test_who_cannot_be_let_in_does_not_keep_flows_in_debt_out():
    queue: FairQueue[str] = FairQueue()
    blocked, debtor = ("", "blocked@1"), ("", "debtor@1")
    for key in (debtor, debtor, blocked):
        queue.push(key, key[1])
    next(queue.in_order())
    queue.start(debtor)
    queue.charge(debtor, 1000)
    assert [key for key, _ in queue.in_order()] == [blocked, debtor]


def test_many_adapters_do_not_make_a_tenants_share_larger():
    queue: FairQueue[int] = FairQueue()
    many = [("crawler", f"a{number}@1") for number in range(50)]
    one = ("person", "own@1")
    for turn in range(40):
        for key in [*many, one]:
            queue.push(key, turn)
    served = serve(queue, dict.fromkeys([*many, one], 100), 60)
    assert served.count(one) == pytest.approx(30, abs=2)
    assert one in served[:2]
    of_many = [served.count(key) for key in many]
    assert max(of_many) <= 1  # who are served in turn among themselves
    alike = [("", key[1]) for key in [*many, one]]  # the twin: all of one tenant
    queue = FairQueue()
    for turn in range(40):
        for key in alike:
            queue.push(key, turn)
    assert serve(queue, dict.fromkeys(alike, 100), 60).count(("", "own@1")) <= 2


def test_an_idle_flow_is_forgotten():
    queue: FairQueue[int] = FairQueue()
    queue.push(("a", ""), 1)
    serve(queue, {("a", ""): 10**6}, 1)
    assert len(queue) == 0
    queue.push(("a", ""), 2)
    assert next(queue.in_order())[1] == 2


# -- adapter slots -------------------------------------------------------------------------------------------------


def adapter(key: str, rank: int = 2, value: float = 1.0, groups: tuple[str, ...] = ("q", "o")) -> HostAdapter:
    tensor = torch.full((rank, 8), float(value))
    full = Factors(tensor, (tensor,), (Segment(0, 0, rank, 0, 8),))
    return HostAdapter(key, dict.fromkeys(groups, full))


SIZE = adapter("x").num_bytes  # 256


def make_slots(num_adapters: int) -> AdapterSlots:
    return AdapterSlots(budget_bytes=num_adapters * SIZE, device=torch.device("cpu"))


def test_slots_hold_copies_and_the_least_recently_used_goes_first():
    slots = make_slots(2)
    for number, key in enumerate("ab"):
        assert slots.acquire(adapter(key, value=number))
        slots.release(key)
    assert slots.acquire(adapter("a"))
    assert slots.acquire(adapter("c", value=7))
    assert slots.keys == ("a", "c")
    place = slots.place("c")
    assert (place.slab.factors["q"].a[place.slot] == 7).all()
    assert not slots.acquire(adapter("d"))  # both are in use
    slots.release("a")
    assert slots.acquire(adapter("d"))
    assert slots.keys == ("c", "d")
    assert slots.used_bytes <= slots.budget_bytes


def test_adapters_of_another_shape_get_the_room_of_unused_ones():
    slots = make_slots(4)
    for key in "abcd":
        assert slots.acquire(adapter(key))
    assert not slots.acquire(adapter("wide", rank=4))  # twice the size
    for key in "ab":
        slots.release(key)
    assert slots.acquire(adapter("wide", rank=4))
    assert slots.used_bytes == slots.budget_bytes
    assert set(slots.keys) == {"c", "d", "wide"}


def test_adapters_of_several_shapes_fit_beside_each_other():
    """No slab of a first shape takes what the next ones need."""
    slots = make_slots(32)
    ranks = (2, 4, 6, 8, 10)
    assert all(slots.acquire(adapter(f"rank {rank}", rank=rank)) for rank in ranks)
    assert slots.used_bytes <= slots.budget_bytes
    assert len(slots.keys) == len(ranks)  # and none has gone for another


def test_room_of_unloaded_adapters_is_there_for_another_shape():
    slots = make_slots(4)
    assert slots.acquire(adapter("small"))
    slots.release("small")
    slots.drop("small")
    assert slots.acquire(adapter("wide", rank=8))  # four times the size: the whole budget


def test_nothing_is_given_up_for_an_adapter_that_would_not_fit_all_the_same():
    slots = make_slots(4)
    for key in "abcd":
        assert slots.acquire(adapter(key))
    for key in "bcd":
        slots.release(key)
    assert not slots.acquire(adapter("wide", rank=8))
    assert slots.keys == ("a", "b", "c", "d")
    assert slots.acquire(adapter("e"))  # of their own shape
    assert slots.keys == ("a", "c", "d", "e")


def test_an_adapter_that_can_never_fit_is_refused():
    with pytest.raises(AdapterError, match=r"huge@1: takes 1,024 bytes, over this endpoint's adapters\.device_budget"):
        make_slots(2).check(adapter("huge@1", rank=8))


def test_neighbours_with_few_tokens_are_one_run_and_the_padding_is_known():
    slots = make_slots(64)
    for key in "abc":
        slots.acquire(adapter(key))
    places = [slots.place(key) for key in "abc"]
    even = matmul_runs([(places[0], 0, 2), (places[1], 2, 2), (places[2], 4, 2)], torch.device("cpu"))
    assert [(run.first, run.end, run.real) for run in even] == [(0, 3, None)]
    uneven = matmul_runs([(places[0], 0, 1), (places[1], 1, 3)], torch.device("cpu"))
    assert uneven[0].rows.tolist() == [0, 0, 0, 1, 2, 3]
    assert uneven[0].real.tolist() == [0, 3, 4, 5]
    apart = matmul_runs([(places[0], 0, 1), (places[2], 1, 1), (places[1], 2, 40)], torch.device("cpu"))
    assert [(run.first, run.end) for run in apart] == [(0, 1), (1, 2), (2, 3)]  # a long one alone


# -- the scheduler ---------------------------------------------------------------------------------------------------


class Slots:
    """Room for some adapters; remembers who was let in."""

    def __init__(self, room: int):
        self.room = room
        self.pins: dict[str, int] = {}

    def acquire(self, key: str) -> bool:
        if key not in self.pins and len(self.pins) == self.room:
            return False
        self.pins[key] = self.pins.get(key, 0) + 1
        return True

    def is_on_device(self, key: str) -> bool:
        return key in self.pins

    def release(self, key: str) -> None:
        self.pins[key] -= 1
        if not self.pins[key]:
            del self.pins[key]


def make_scheduler(*, room: int = 100, places: int = 4, pages: int = 200) -> Scheduler:
    return Scheduler(pages + 1, max_sequences=places, max_prefill_tokens=64, adapters=Slots(room))


def sequence(
    name: str, *, adapter: str | None = None, tenant: str = "", user: str = "", prompt: int = 10, answer: int = 20
) -> Sequence:
    unused: Any = SimpleNamespace()
    request = Request(name, list(range(prompt)), SamplingParams(), adapter, tenant, user)
    return Sequence(
        request=request,
        index=0,
        text=unused,
        sampler=unused,
        max_tokens=answer,
        salt=name.encode(),
        tokens=list(request.prompt_ids),
    )


def steps(scheduler: Scheduler, *, more=lambda step: [], limit: int = 5000) -> dict[str, tuple[int, int]]:
    """Runs to the end; {name: (step of its first token, of its last)}. `more(step)`: sequences that come in then."""
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for step in range(limit):
        for new in more(step):
            scheduler.add(new)
        pieces = scheduler.plan()
        if not pieces and not len(scheduler.waiting):
            return {name: (first[name], last[name]) for name in last}
        for piece in pieces:
            ends = piece.is_last
            scheduler.computed(piece)
            if ends:
                first.setdefault(piece.sequence.request.id, step)
                piece.sequence.tokens.append(1)
                if piece.sequence.num_generated == piece.sequence.max_tokens:
                    last[piece.sequence.request.id] = step
                    scheduler.remove(piece.sequence)
    raise AssertionError("it did not end")


def light_beside_heavy(*, same_flow: bool) -> dict[str, int]:
    """A flood of 100 answers of 20 tokens at 4 places; a light tenant's request every 50 steps. Its waits, in steps."""
    scheduler = make_scheduler()
    for i in range(100):
        scheduler.add(sequence(f"heavy{i}", adapter="heavy@1", tenant="crawler"))
    tenant, own = ("crawler", "heavy@1") if same_flow else ("person", "light@1")
    asked = {f"light{i}": 50 * i + 7 for i in range(4)}

    def more(step):
        return [sequence(name, adapter=own, tenant=tenant) for name, at in asked.items() if at == step]

    done = steps(scheduler, more=more)
    return {name: done[name][0] - at for name, at in asked.items()}


def test_a_flood_does_not_keep_a_light_tenant_waiting():
    """One answer takes 20 steps: a place becomes free within so many, and the light tenant gets it."""
    assert max(light_beside_heavy(same_flow=False).values()) <= 21


def test_without_flows_of_its_own_it_would_wait_for_the_whole_flood():
    """The twin: the same requests in one queue."""
    assert min(light_beside_heavy(same_flow=True).values()) > 200


def newcomers_wait_among_strangers() -> int:
    """Nobody has a key: 200 requests for one adapter, each of another `user`, then one for another adapter."""
    scheduler = make_scheduler()
    for i in range(200):
        scheduler.add(sequence(f"heavy{i}", adapter="heavy@1", user=f"somebody-{i}"))
    light = sequence("light", adapter="light@1", user="person")
    return steps(scheduler, more=lambda step: [light] if step == 7 else [])["light"][0] - 7


def test_many_names_of_strangers_do_not_make_an_adapters_share_larger():
    assert newcomers_wait_among_strangers() <= 21


def test_with_a_share_for_every_name_the_newcomer_would_wait_for_all_of_them(monkeypatch):
    """The twin: names that anybody may make up count like tenants."""
    monkeypatch.setattr(Request, "flow", property(lambda request: (request.user, request.adapter or "")))
    assert newcomers_wait_among_strangers() > 900


def first_token_beside_long_answers(*, tenant: str, adapter: str) -> tuple[int, Scheduler]:
    """Four answers of 500 tokens hold the four places; how many steps another's request waits."""
    scheduler = make_scheduler()
    for number in range(4):
        scheduler.add(sequence(f"long{number}", adapter="heavy@1", tenant="crawler", answer=500))
    done = steps(scheduler, more=lambda step: [sequence("new", adapter=adapter, tenant=tenant)] if step == 9 else [])
    assert len(done) == 5  # nobody is lost
    assert scheduler.pool.num_used == 0
    return done["new"][0] - 9, scheduler


@pytest.mark.parametrize("tenant", ["person", "crawler"], ids=["tenants", "adapters"])
def test_long_answers_that_hold_every_place_give_one_up(tenant):
    waited, scheduler = first_token_beside_long_answers(tenant=tenant, adapter="light@1")
    assert waited <= MAX_STEPS_CROWDED_OUT + 2
    assert scheduler.num_preemptions == 1


def test_of_its_own_flow_a_request_waits_for_the_end_of_an_answer():
    waited, scheduler = first_token_beside_long_answers(tenant="crawler", adapter="heavy@1")
    assert waited > 450
    assert scheduler.num_preemptions == 0


def test_with_admission_alone_it_would_wait_as_long(monkeypatch):
    """The twin."""
    monkeypatch.setattr(StarvationPolicy, "_free_place", lambda self: None)
    assert first_token_beside_long_answers(tenant="person", adapter="light@1")[0] > 450


@pytest.mark.parametrize("lacks", ["pages", "a share of the prompts' tokens"])
def test_no_place_is_given_up_where_it_would_not_help(lacks):
    """All four places are taken; the pages are in use by those that would stay. Or a place is free, and a long prompt
    takes all that a step computes of prompts."""
    scheduler = make_scheduler(pages=150 if lacks == "pages" else 600)
    prompt = 10 if lacks != "a share of the prompts' tokens" else 64 * 100
    for number in range(4 if prompt == 10 else 3):
        new = sequence(f"long{number}", adapter="heavy@1", tenant="crawler", answer=400, prompt=prompt)
        scheduler.add(new)
    wide = 16 * 140 if lacks == "pages" else 10
    new = sequence("new", adapter="light@1", tenant="person", prompt=wide)
    done = steps(scheduler, more=lambda step: [new] if step == 9 else [])
    assert len(done) == 4 + (prompt == 10)
    assert scheduler.num_preemptions == 0


def test_adapters_that_wait_for_a_slot_are_passed_over_but_not_for_ever():
    scheduler = make_scheduler(room=1, places=4)
    busy = iter(range(10**6))

    def more(step):
        start = [sequence("other", adapter="b@1")] if step == 3 else []
        return start + ([sequence(f"a{next(busy)}", adapter="a@1")] if step % 4 == 0 and step < 600 else [])

    done = steps(scheduler, more=more)
    assert done["other"][0] - 3 <= MIN_STEPS + 30
    assert any(first > 3 and first < done["other"][0] for name, (first, _) in done.items() if name != "other")


def light_under_a_full_cache() -> tuple[int, int]:
    """A crawler's long answers fill the cache; a person's one comes in meanwhile. Steps from its first token to its
    last, and how many tokens were paid for."""
    scheduler = make_scheduler(places=8, pages=60)
    charge, paid = scheduler.waiting.charge, []

    def charged(key, num_tokens):
        paid.append(num_tokens)
        charge(key, num_tokens)

    scheduler.waiting.charge = charged
    for number in range(5):
        scheduler.add(sequence(f"{number}", adapter="heavy@1", tenant="crawler", answer=300))
    light = sequence("light", adapter="light@1", tenant="person", answer=100)
    first, last = steps(scheduler, more=lambda step: [light] if step == 100 else [])["light"]
    assert scheduler.num_preemptions > 0
    return last - first, sum(paid)


def test_who_has_most_of_a_full_cache_gives_pages_and_pays_for_no_token_twice(monkeypatch):
    length, paid = light_under_a_full_cache()
    assert length == 99  # never interrupted
    assert paid == 5 * (10 + 299) + 10 + 99
    monkeypatch.setattr(Scheduler, "_giver_of_pages", lambda scheduler: scheduler.running[-1])  # the twin
    assert light_under_a_full_cache()[0] > 99


def waits_for_a_slot(*, num_waiting: int, places: int = 8, per_adapter: int = 1) -> tuple[list[int], Scheduler]:
    """Long answers of two adapters hold the two slots; how many steps requests for other adapters wait."""
    scheduler = make_scheduler(room=2, places=places)
    for number in range(2):
        for twin in range(per_adapter):
            scheduler.add(sequence(f"long{number} {twin}", adapter=f"long{number}@1", answer=600))
    new = [sequence(f"{number}", adapter=f"new{number}@1", answer=200) for number in range(num_waiting)]
    done = steps(scheduler, more=lambda step: new if step == 9 else [])
    assert len(done) == 2 * per_adapter + num_waiting  # nobody is lost
    assert scheduler.pool.num_used == 0
    return [done[f"{number}"][0] - 9 for number in range(num_waiting)], scheduler


@pytest.mark.parametrize("places", [2, 8], ids=["no place either", "places"])
@pytest.mark.parametrize("num_waiting", [1, 2, 5])
def test_long_answers_that_hold_every_slot_give_one_up(num_waiting, places):
    """An adapter has its slot for so many steps, then the next that waits has it, two at a time."""
    waits, scheduler = waits_for_a_slot(num_waiting=num_waiting, places=places)
    assert max(waits) <= (MIN_STEPS + 3) * (1 + (num_waiting - 1) // 2)
    assert scheduler.num_preemptions <= 2 * scheduler._starvation._step // MIN_STEPS  # turns, no thrashing


def test_they_would_keep_them_to_their_end(monkeypatch):
    """The twin."""
    monkeypatch.setattr(StarvationPolicy, "_free_slots", lambda *_: None)
    assert min(waits_for_a_slot(num_waiting=1)[0]) > 550


def test_an_adapter_whose_turn_it_is_brings_all_its_answers_in():
    """Not one of them while the other places are empty; and who needs no slot is not kept out."""
    scheduler = make_scheduler(room=1, places=5)
    for name in "ab":
        for number in range(4):
            scheduler.add(sequence(f"{name}{number}", adapter=f"{name}@1", answer=300))
    new = sequence("plain", answer=10)
    done = steps(scheduler, more=lambda step: [new] if step == 80 else [])
    assert done["plain"] == (80, 89)
    assert max(first for name, (first, _) in done.items() if name[0] == "b") <= MIN_STEPS + 3
    assert max(last for _, last in done.values()) < 2 * 300 + 30  # 4 at a time, whoever's turn it is


def test_long_prompts_that_push_each_other_out_of_the_cache_all_end():
    """A prompt takes more steps than a turn at a slot, and the cache holds two of the three."""
    scheduler = make_scheduler(room=1, pages=640)
    for number in range(3):
        scheduler.add(sequence(f"{number}", adapter=f"{number}@1", prompt=64 * 70, answer=150))
    done = steps(scheduler)
    assert len(done) == 3
    assert scheduler.num_preemptions > 0


def test_a_tenants_many_adapters_do_not_take_anothers_only_slot():
    scheduler = make_scheduler(room=2, places=8)
    for number in range(6):
        scheduler.add(sequence(f"many{number}", adapter=f"many{number}@1", tenant="crawler", answer=300))
    one = sequence("one", adapter="one@1", tenant="person", answer=600)
    first, last = steps(scheduler, more=lambda step: [one] if step == 0 else [])["one"]
    assert last - first == 599  # never interrupted
    assert first <= MIN_STEPS + 3


def test_adapters_that_equal_owners_share_keep_neither_from_another_adapter():
    scheduler = make_scheduler(room=1, places=8)

    def more(step):
        new = [sequence("other", adapter="other@1", tenant="one")] if step == 30 else []
        if step % 8 == 0 and step < 800:
            new += [sequence(f"{tenant}{step}", adapter="shared@1", tenant=tenant) for tenant in ("one", "two")]
        return new

    assert steps(scheduler, more=more)["other"][0] - 30 <= 2 * MIN_STEPS


def wide_beside_streams() -> int:
    """Short answers of the base take the pages as they come free, others the slot; how long a wide prompt for another
    adapter waits."""
    scheduler = make_scheduler(room=1, places=12, pages=110)
    wide = sequence("wide", adapter="wide@1", tenant="person", prompt=16 * 70)

    def more(step):
        new = [wide] if step == 30 else []
        if step % 6 == 0 and step < 1500:
            new.append(sequence(f"base{step}", tenant="crawler", prompt=16 * 12, answer=40))
            new.append(sequence(f"a{step}", adapter="a@1", tenant="crawler"))
        return new

    return steps(scheduler, more=more)["wide"][0] - 30


def test_who_is_starved_and_lacks_pages_too_gets_both(monkeypatch):
    assert wide_beside_streams() <= 300
    give_up = StarvationPolicy._free_slots
    monkeypatch.setattr(StarvationPolicy, "_free_slots", lambda *arguments: give_up(*arguments) or True)  # the twin
    assert wide_beside_streams() > 1000


def test_no_slot_is_given_up_for_one_that_lacks_pages():
    scheduler = make_scheduler(room=1, pages=150)
    scheduler.add(sequence("base", prompt=16 * 100, answer=400))
    scheduler.add(sequence("long", adapter="long@1", answer=300))
    scheduler.add(sequence("wide", adapter="wide@1", prompt=16 * 80))
    assert len(steps(scheduler)) == 3
    assert scheduler.num_preemptions == 0


def test_the_newest_gives_way_when_the_cache_is_full_and_all_end():
    scheduler = make_scheduler(places=8, pages=8)
    for i in range(6):
        scheduler.add(sequence(f"{i}", prompt=10, answer=50))
    done = steps(scheduler)
    assert len(done) == 6
    assert scheduler.num_preemptions > 0
    assert scheduler.pool.num_used == 0
    assert done["0"][1] < done["5"][1]


def test_who_waits_for_a_slot_of_vllms_is_passed_over_but_not_for_ever_and_bars_nobody_who_needs_none():
    engine = VllmEngine.__new__(VllmEngine)
    engine.config, engine.num_slots, engine._num_running = EngineConfig(max_sequences=1000), 1, 0
    engine._waiting, engine._adapters_in_use = FairQueue(), Counter(["a@1"])

    def add(adapter: str | None) -> None:
        answering = Answering(Request("", [5], adapter=adapter), None, None)
        engine._waiting.push(answering.request.flow, answering)

    def next_one() -> str | None:
        found = engine._next()
        if found is None:
            return "nobody"
        engine._waiting.start(found[0])
        return found[1].request.adapter

    add("b@1")
    assert [next_one() for _ in range(1000)] == ["nobody"] * 1000  # looking is no passing over
    passing = []
    while not passing or passing[-1] != "nobody":
        add("a@1")
        passing.append(next_one())
    assert MAX_PASSED_OVER <= len(passing) <= 2 * MAX_PASSED_OVER + 2
    for _ in range(10):
        add(None)
        assert next_one() is None
    engine._adapters_in_use.clear()
    assert next_one() == "b@1"
