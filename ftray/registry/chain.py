"""The journal's entries as a chain: each names its number, the registry, and the hash of the entry before.

So an entry that was lost, cut, put back from a copy or taken from another registry is found, and nothing is applied on
top of it. Entries of the first ftray (0.1) name none of the three and are read as they are; after the first that does,
every one must. The registry's identity is a random one in its first entry, or that entry's hash where it has none.
"""

import hashlib
import json
import uuid
from typing import Any

from ftray.errors import DamagedError
from ftray.registry.journal import Journal

SEQ, REGISTRY, FOLLOWS = "seq", "registry", "follows"
REPAIR = "`ftray adapters verify` looks at all of it, and with --rebuild makes the journal anew"


def digest_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def unlinked(entry: dict[str, Any]) -> dict[str, Any]:
    """What it says, without its place."""
    return {key: value for key, value in entry.items() if key not in (SEQ, REGISTRY, FOLLOWS)}


def entry_key(seq: int) -> str:
    return f"journal/{seq}.json"


class Chain:
    """Where a reader stands in the journal of `location`."""

    def __init__(self, location: str):
        self._location = location
        self.last: str | None = None  # the hash of the last entry
        self._identity: str | None = None
        self._is_linked = False  # an entry has named the one before

    def link(self, seq: int) -> dict[str, Any]:
        """What the entry `seq` that is written next says of its place."""
        return {SEQ: seq, REGISTRY: self._identity or uuid.uuid4().hex, FOLLOWS: self.last}

    def follow(self, journal: Journal, content: bytes) -> None:
        """The next entry, applied to the journal. Raises `DamagedError`, and then nothing has changed."""
        seq = journal.last_seq + 1
        entry = self._parse(seq, content)
        if FOLLOWS in entry:
            self._check_link(seq, entry)
        elif self._is_linked:
            raise self.damaged(seq, f"does not say that it follows {seq - 1}.json: it is of another registry, or older")
        try:
            journal.apply(seq, unlinked(entry))
        except ValueError as error:
            raise self.damaged(seq, f"cannot be applied: {error}") from None
        self.last = digest_of(content)
        self._identity = self._identity or entry.get(REGISTRY) or self.last
        self._is_linked = self._is_linked or FOLLOWS in entry

    def damaged(self, seq: int, what: str) -> DamagedError:
        return DamagedError(f"{self._location}/{entry_key(seq)}: {what}; {REPAIR}")

    def _parse(self, seq: int, content: bytes) -> dict[str, Any]:
        try:
            entry = json.loads(content)
        except (ValueError, RecursionError):
            cut = "is empty" if not content else "is cut short or overwritten"
            raise self.damaged(seq, f"{cut} ({len(content)} bytes)") from None
        if not isinstance(entry, dict) or not isinstance(entry.get("type"), str):
            raise self.damaged(seq, "is no entry of a journal")
        return entry

    def _check_link(self, seq: int, entry: dict[str, Any]) -> None:
        if self._identity is not None and entry.get(REGISTRY) != self._identity:
            raise self.damaged(seq, "belongs to another registry: two were copied into one place")
        if entry.get(SEQ) != seq:
            raise self.damaged(seq, f"was written as {entry.get(SEQ)}.json: it was renamed or copied")
        if entry[FOLLOWS] != self.last:
            raise self.damaged(seq, f"does not follow {seq - 1}.json as it is: one of the two was put back or changed")
