"""Which adapters are in memory: loaded on demand, one load in flight per version, pinned while a request uses them,
and evicted by bytes, least recently used first, never a pinned one."""

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass

Load = Callable[[str], Coroutine[None, None, int]]  # key -> bytes
Unload = Callable[[str], Coroutine[None, None, None]]


@dataclass
class Resident:
    loading: asyncio.Task[int]
    num_bytes: int = 0
    pins: int = 0


class AdapterResidency:
    def __init__(self, load: Load, unload: Unload, *, budget_bytes: int):
        self._load = load
        self._unload = unload
        self._budget_bytes = budget_bytes
        self._residents: OrderedDict[str, Resident] = OrderedDict()  # least recently used first

    @contextlib.asynccontextmanager
    async def pinned(self, key: str) -> AsyncIterator[None]:
        """Loads the adapter if it is not here; while the context is open it stays."""
        resident = self._residents.get(key)
        if resident is None:
            resident = Resident(asyncio.ensure_future(self._load(key)))
            self._residents[key] = resident
        self._residents.move_to_end(key)
        resident.pins += 1
        try:
            try:
                # shielded: one caller that gives up must not cancel the load that others wait for
                resident.num_bytes = await asyncio.shield(resident.loading)
            except asyncio.CancelledError:
                raise
            except BaseException:
                if self._residents.get(key) is resident:
                    del self._residents[key]  # a later request tries again
                raise
            await self._evict()
            yield
        finally:
            resident.pins -= 1

    @property
    def resident_keys(self) -> list[str]:
        return list(self._residents)

    async def _evict(self) -> None:
        while sum(r.num_bytes for r in self._residents.values()) > self._budget_bytes:
            victim = next((key for key, r in self._residents.items() if r.pins == 0 and r.loading.done()), None)
            if victim is None:
                return  # all in use: over the budget for a while rather than a failed request
            del self._residents[victim]
            await asyncio.shield(self._unload(victim))
