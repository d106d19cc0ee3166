"""Who may load an adapter next: some at a time, and parties (tenants; else the users that requests name) take turns, so
that one that asks for hundreds of adapters does not keep another waiting for its one."""

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import AsyncIterator

Turn = asyncio.Event  # set when it has come


class LoadTurns:
    def __init__(self, places: int):
        self._free = places
        self._waiting: dict[str, Turn] = {}  # by adapter
        self._asked: OrderedDict[str, OrderedDict[str, None]] = OrderedDict()  # parties, the next first: their adapters

    def ask(self, party: str, adapter: str) -> Turn:
        """Also for one that another party waits for: whose turn is first brings it in for both."""
        self._asked.setdefault(party, OrderedDict()).setdefault(adapter)
        turn = self._waiting.setdefault(adapter, Turn())
        self._give()
        return turn

    def is_waiting(self, adapter: str) -> bool:
        return adapter in self._waiting

    def withdraw(self, adapter: str) -> None:
        """Nobody waits for it any more."""
        del self._waiting[adapter]
        for party in [party for party, adapters in self._asked.items() if adapter in adapters]:
            del self._asked[party][adapter]
            if not self._asked[party]:
                del self._asked[party]

    @contextlib.asynccontextmanager
    async def taken(self, turn: Turn) -> AsyncIterator[None]:
        """Waits for the turn; the place is free again when the context closes."""
        try:
            await turn.wait()
            yield
        finally:
            if turn.is_set():
                self._free += 1
                self._give()

    def _give(self) -> None:
        while self._free and self._asked:
            party, adapters = next(iter(self._asked.items()))
            adapter = next(iter(adapters))
            self._asked.move_to_end(party)
            turn = self._waiting[adapter]
            self.withdraw(adapter)
            self._free -= 1
            turn.set()
