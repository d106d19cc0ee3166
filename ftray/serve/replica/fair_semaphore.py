"""Who may do next what only some can do at a time (load an adapter, compile a schema): owners (tenants; else the users
that requests name) take turns, so that one that asks for hundreds of adapters does not keep another waiting for its
one."""

import asyncio
import contextlib
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator

Permit = asyncio.Event  # set when it has come


class FairSemaphore:
    def __init__(self, places: int):
        self._free = places
        self._waiting: dict[str, Permit] = {}  # by key: an adapter
        self._asked: OrderedDict[str, OrderedDict[str, None]] = OrderedDict()  # owners, the next first: their keys

    def ask(self, owner: str, key: str) -> Permit:
        """Also for one that another owner waits for: whose turn is first brings it in for both."""
        self._asked.setdefault(owner, OrderedDict()).setdefault(key)
        turn = self._waiting.setdefault(key, Permit())
        self._give()
        return turn

    def is_waiting(self, key: str) -> bool:
        return key in self._waiting

    def withdraw(self, key: str) -> None:
        """Nobody waits for it any more."""
        del self._waiting[key]
        for owner in [owner for owner, keys in self._asked.items() if key in keys]:
            del self._asked[owner][key]
            if not self._asked[owner]:
                del self._asked[owner]

    @contextlib.asynccontextmanager
    async def taken(self, turn: Permit) -> AsyncIterator[None]:
        """Waits for the turn; the place is free again when the context closes."""
        try:
            await turn.wait()
            yield
        finally:
            if turn.is_set():
                self._free += 1
                self._give()

    @contextlib.asynccontextmanager
    async def one(self, owner: str) -> AsyncIterator[None]:
        """A turn for this alone."""
        key = uuid.uuid4().hex
        turn = self.ask(owner, key)
        try:
            async with self.taken(turn):
                yield
        finally:
            if self.is_waiting(key):  # cancelled
                self.withdraw(key)

    def _give(self) -> None:
        while self._free and self._asked:
            owner, keys = next(iter(self._asked.items()))
            key = next(iter(keys))
            self._asked.move_to_end(owner)
            turn = self._waiting[key]
            self.withdraw(key)
            self._free -= 1
            turn.set()
