"""Adapters brought in before anybody asks: when an alias moves to a new version of a name that is served here, and when
one that is asked for often has been driven out."""

import asyncio
import contextlib
import logging

from ftray.errors import FtrayError
from ftray.registry import Registry
from ftray.serve.replica.residency import AdapterResidency

POLL_S = 2.0

log = logging.getLogger("ftray.serve")


class Prefetcher:
    def __init__(self, registry: Registry, residency: AdapterResidency):
        self._registry = registry
        self._residency = residency
        self._seen: int | None = None  # entries of the journal; none before the first look, which only counts them

    async def follow(self) -> None:
        """Until it is cancelled."""
        while True:
            try:
                await self.look()
            except FtrayError:  # the store does not answer: requests tell, the next look may succeed
                pass
            except Exception:  # an entry that nobody can read must not end this for good
                log.exception("prefetch: the registry's journal cannot be read")
            await self.return_hottest()
            await asyncio.sleep(POLL_S)

    async def look(self) -> None:
        """Once through what is new in the journal."""
        entries = (await asyncio.to_thread(self._registry.refresh)).entries
        fresh = [] if self._seen is None else entries[self._seen :]
        self._seen = len(entries)
        used = {key.partition("@")[0] for key in self._residency.resident_keys}
        for entry in fresh:
            if entry["type"] == "alias" and entry["name"] in used:
                await self._bring(f"{entry['name']}@{entry['number']}")

    async def return_hottest(self) -> None:
        hot = self._residency.worth_prefetching()
        if hot is not None:
            await self._bring(hot)

    async def _bring(self, key: str) -> None:
        with contextlib.suppress(Exception):  # whatever fails will be told to the first who asks
            await self._residency.prefetch(key)
