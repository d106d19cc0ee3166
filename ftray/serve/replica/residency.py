"""Which adapters are in memory: loaded on demand, one load in flight per version, pinned while a request uses them,
and evicted by bytes, least recently used first, never a pinned one."""

import asyncio
import contextlib
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Literal

from ftray.errors import AdapterError, FtrayError
from ftray.infer.protocol import PreparedAdapter
from ftray.serve.replica.fair_semaphore import FairSemaphore, Permit
from ftray.serve.replica.popularity import Traffic

# Adapters read and checked at the same time, beside the budget; owners take turns.
MAX_LOADS = 2
# An adapter is brought in unasked after so many requests in the last minute or two, and in the place of another only if
# it is asked for so many times as often.
HOT = 2.0
HOTTER = 2.0

# A load waits so long for one adapter of which no request is in flight.
PATIENCE_S = 5.0

PREFETCH = "(prefetch)"  # loads that no request waits for take turns like an owner's

ResidencyEvent = Literal["hit", "miss", "loaded", "failed", "evicted"]
Signal = Callable[[ResidencyEvent, str, float], None]  # the adapter, and how many seconds a load took
Prepare = Callable[[str], Coroutine[None, None, PreparedAdapter]]
Load = Callable[[Any], Coroutine[None, None, None]]
Unload = Callable[[str], Coroutine[None, None, None]]


class NoRoomError(FtrayError):
    """For an adapter that no request waits for."""


@dataclass
class Resident:
    loading: asyncio.Task[None]
    num_bytes: int = 0
    users: Counter[str] = field(default_factory=Counter)  # requests that have it, by owner

    @property
    def pins(self) -> int:
        return self.users.total()


class AdapterResidency:
    def __init__(
        self,
        prepare: Prepare,
        load: Load,
        unload: Unload,
        *,
        budget_bytes: int,
        patience_s: float = PATIENCE_S,
        signal: Signal = lambda *_: None,
    ):
        self._prepare = prepare
        self._load = load
        self._unload = unload
        self.budget_bytes = budget_bytes
        self._patience_s = patience_s
        self._signal = signal
        self._residents: OrderedDict[str, Resident] = OrderedDict()  # least recently used first
        self._semaphore = FairSemaphore(MAX_LOADS)
        self._may_place = asyncio.Lock()  # first come, first served
        self._unpinned = asyncio.Event()
        self._leaving: str | None = None  # it goes once the requests that have it have ended: nobody new gets it
        self._has_left = asyncio.Event()
        self._bad: set[str] = set()  # those that could not be loaded, until they can
        self.traffic = Traffic()

    @contextlib.asynccontextmanager
    async def pinned(self, key: str, *, owner: str = "") -> AsyncIterator[None]:
        """For a request: loads the adapter if it is not here; while the context is open it stays."""
        self.traffic.note(key)
        self._signal("hit" if self.is_resident(key) else "miss", key, 0.0)
        async with self._held(key, owner):
            yield

    @contextlib.asynccontextmanager
    async def _held(self, key: str, owner: str) -> AsyncIterator[None]:
        while key == self._leaving:
            await self._has_left.wait()
        resident = self._residents.get(key)
        if resident is None:
            turn = self._semaphore.ask(owner, key)
            resident = Resident(asyncio.ensure_future(self._bring(key, turn)))
            self._residents[key] = resident
            resident.loading.add_done_callback(lambda task: self._forget_if_failed(key, task))
        elif self._semaphore.is_waiting(key):
            self._semaphore.ask(owner, key)
        self._residents.move_to_end(key)
        resident.users[owner] += 1
        try:
            # shielded: one caller that gives up must not cancel the load that others wait for
            await asyncio.shield(resident.loading)
            yield
        finally:
            resident.users -= Counter([owner])
            if resident.pins == 0:
                self._unpinned.set()
                if self._residents.get(key) is resident and self._semaphore.is_waiting(key):
                    self._abandon(key)

    async def prefetch(self, key: str) -> None:
        """Brings an adapter in before anybody asks for it."""
        async with self._held(key, PREFETCH):
            pass

    def worth_prefetching(self) -> str | None:
        """The most asked for of those that are not here, if there is room or what would go is asked for far less: a
        flood of adapters used once drives hot ones out."""
        away = next((k for k in self.traffic.hottest() if k not in self._residents and k not in self._bad), None)
        if away is None or self.traffic.count(away) < HOT:
            return None
        largest = max((resident.num_bytes for resident in self._residents.values()), default=0)
        if self.resident_bytes + largest <= self.budget_bytes:
            return away
        victim = self._next_victim()
        worth = victim is not None and self.traffic.count(away) > HOTTER * self.traffic.count(victim)
        return away if worth else None

    def is_resident(self, key: str) -> bool:
        return key in self._residents and self._residents[key].loading.done()

    def num_pins(self, key: str) -> int:
        return self._residents[key].pins if key in self._residents else 0

    @property
    def resident_keys(self) -> list[str]:
        return list(self._residents)

    @property
    def resident_bytes(self) -> int:
        return sum(resident.num_bytes for resident in self._residents.values())

    async def _bring(self, key: str, turn: Permit) -> None:
        began = time.perf_counter()
        async with self._semaphore.taken(turn):
            adapter = await self._prepare(key)
            if adapter.num_bytes > self.budget_bytes:
                raise AdapterError(
                    f"{key}: takes {adapter.num_bytes:,} bytes, over this endpoint's adapters.host_budget "
                    f"({self.budget_bytes:,}); raise it or publish a smaller rank"
                )
            async with self._may_place:
                await self._make_room(key, adapter.num_bytes)
                await self._load(adapter)
                self._residents[key].num_bytes = adapter.num_bytes
        self._bad.discard(key)
        self._signal("loaded", key, time.perf_counter() - began)

    def _abandon(self, key: str) -> None:
        """Everybody who wanted it has left before its load's turn came."""
        self._semaphore.withdraw(key)
        self._residents.pop(key).loading.cancel()

    def _forget_if_failed(self, key: str, loading: asyncio.Task[None]) -> None:
        """Also when nobody waits any more: a later request tries again."""
        has_failed = loading.cancelled() or loading.exception() is not None
        resident = self._residents.get(key)
        if has_failed and resident is not None and resident.loading is loading:
            del self._residents[key]
            if loading.cancelled() or not isinstance(loading.exception(), NoRoomError):
                self._bad.add(key)
                self._signal("failed", key, 0.0)

    def _next_victim(self) -> str | None:
        return next((k for k, r in self._residents.items() if r.pins == 0 and r.num_bytes and r.loading.done()), None)

    async def _make_room(self, key: str, num_bytes: int) -> None:
        """Waits while everything that could go is in use: running requests end, and the budget holds. Where requests
        for each of them overlap without end, one after the other has to go; but for a request, not for a prefetch."""
        patient_until = time.monotonic() + self._patience_s
        try:
            while self.resident_bytes + num_bytes > self.budget_bytes:
                victim = self._next_victim()
                if victim is None:
                    await self._wait_for_end_of_use(key, patient_until)
                    continue
                del self._residents[victim]
                await self._unload(victim)
                self._signal("evicted", victim, 0.0)
                if victim == self._leaving:
                    self._nobody_has_to_go()
                    patient_until = time.monotonic() + self._patience_s
        finally:
            self._nobody_has_to_go()

    async def _wait_for_end_of_use(self, key: str, patient_until: float) -> None:
        self._unpinned.clear()
        wait_s = max(0.0, patient_until - time.monotonic()) if self._leaving is None else None
        try:
            await asyncio.wait_for(self._unpinned.wait(), wait_s)
        except TimeoutError:
            if set(self._residents[key].users) <= {PREFETCH}:
                raise NoRoomError("every adapter in memory is in use (adapters.host_budget); try again") from None
            self._leaving = self._least_wanted()
            self._has_left.clear()

    def _nobody_has_to_go(self) -> None:
        self._leaving = None
        self._has_left.set()

    def _least_wanted(self) -> str:
        """Of those in use one of the owner whose adapters take most memory, the one with the fewest requests."""
        num_bytes: Counter[str] = Counter()
        for resident in self._residents.values():
            num_bytes.update(dict.fromkeys(resident.users, resident.num_bytes))

        def order(key: str) -> tuple[int, int]:
            users = self._residents[key].users
            return -min((num_bytes[owner] for owner in users), default=0), users.total()

        return min((k for k, resident in self._residents.items() if resident.num_bytes), key=order)
