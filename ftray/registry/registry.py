"""The registry. Layout under its location:

    adapters/NAME/versions/N/claim.json      created exclusively: this number belongs to one writer
    adapters/NAME/versions/N/files/...       a PEFT directory
    adapters/NAME/versions/N/manifest.json   written last: without it the version does not exist
    journal/SEQ.json                         created exclusively: all that ever happened (`journal.py`), the authority

The only primitive it needs is exclusive create, which local disks, S3, GCS and Azure all have.
"""

import json
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ftray.errors import ConflictError, NotFoundError, UserError
from ftray.registry.journal import Canary, CanaryLimits, Journal
from ftray.registry.reader import AdapterVersion, RegistryReader, files_prefix, version_prefix
from ftray.registry.reference import Reference, check_alias, check_tag, parse_reference
from ftray.storage import AlreadyExists, build_manifest
from ftray.storage.manifest import MANIFEST


class Registry(RegistryReader):
    def publish(self, name: str, directory: Path, *, metadata: dict[str, Any]) -> AdapterVersion:
        """Copies a PEFT directory in as the next version of `name`. A crash in the middle burns the number."""
        parse_reference(name)
        if "@" in name:
            raise UserError(f"{name}: publish takes a name; the registry chooses the version number")
        manifest = build_manifest(directory, metadata={**metadata, "published_at": time.time()})
        number = self._claim(name)
        for entry in manifest.files:
            self._objects.write(f"{files_prefix(name, number)}/{entry.path}", directory / entry.path)
        self._objects.write(f"{version_prefix(name, number)}/{MANIFEST}", manifest.model_dump_json(indent=2).encode())
        self._append(lambda _: {"type": "publish", "name": name, "number": number})
        return AdapterVersion(name, number, manifest)

    def promote(self, reference: str, alias: str, *, expected: int | None = None) -> Reference:
        """Points NAME@alias at a version. With `expected`, a compare-and-swap: refused if the alias moved meanwhile."""
        exact = self.resolve(reference)
        check_alias(alias, alias)

        def move(journal: Journal) -> dict[str, Any]:
            refuse_deleted(journal, exact)
            now = journal.aliases.get((exact.name, alias))
            if expected is not None and now != expected:
                raise ConflictError(f"{exact.name}@{alias}: stands at {now}, expected {expected}; look and try again")
            return alias_entry(exact.name, alias, number=exact.number, previous=now, op="promote")

        self._append(move)
        return exact

    def rollback(self, name: str, alias: str) -> tuple[Reference, Reference]:
        """Points the alias at the version it stood at before; again, at the one before that. Returns (from, to)."""
        moved: list[int] = []

        def move(journal: Journal) -> dict[str, Any]:
            now, before = journal.aliases.get((name, alias)), journal.before(name, alias)
            if now is None:
                self.resolve(Reference(name, alias=alias))  # names what there is
                raise NotFoundError(f"{name}@{alias}: no such alias")
            if before is None:
                raise UserError(f"{name}@{alias}: has only ever stood at {now}; there is nothing to go back to")
            moved[:] = [now, before]
            return alias_entry(name, alias, number=before, previous=now, op="rollback")

        self._append(move)
        return Reference(name, number=moved[0]), Reference(name, number=moved[1])

    def set_canary(self, reference: str, alias: str, percent: float, limits: CanaryLimits) -> Reference:
        """A share of the requests for NAME@alias goes to another version. `percent` in (0, 100)."""
        exact = self.resolve(reference)

        def start(journal: Journal) -> dict[str, Any]:
            refuse_deleted(journal, exact)
            stable = journal.aliases.get((exact.name, alias))
            if stable is None:
                raise NotFoundError(f"{exact.name}@{alias}: no such alias; promote a version to it first")
            if stable == exact.number:
                raise UserError(f"{exact}: is what {exact.name}@{alias} stands at; a canary is another version")
            return canary_entry(exact.name, alias, number=exact.number, percent=percent) | asdict(limits)

        if not 0 < percent < 100:
            raise UserError(f"canary: {percent:g}% is not between 0 and 100; promote sends everything")
        self._append(start)
        return exact

    def end_canary(self, name: str, alias: str, *, reason: str, seq: int | None = None) -> Canary:
        """All requests go to the alias's own version again. With `seq`, only if that canary is still the one."""
        ended: list[Canary] = []

        def stop(journal: Journal) -> dict[str, Any]:
            canary = journal.canaries.get((name, alias))
            if canary is None or (seq is not None and canary.seq != seq):
                raise ConflictError(f"{name}@{alias}: has no such canary")
            ended[:] = [canary]
            return canary_entry(name, alias, number=canary.number, percent=0) | {"reason": reason}

        self._append(stop)
        return ended[0]

    def tag(self, reference: str, *, add: Sequence[str] = (), remove: Sequence[str] = ()) -> list[str]:
        """Returns the version's tags afterwards."""
        exact = self.resolve(reference)
        assert exact.number is not None
        for tag in (*add, *remove):
            check_tag(tag)
        entry = {"type": "tag", "name": exact.name, "number": exact.number, "add": list(add), "remove": list(remove)}
        self._append(lambda _: entry)
        return self.tags(exact.name, exact.number)

    def delete(self, reference: str) -> Reference:
        """For good: the files go, the number is never used again. Refused while an alias or a canary stands on it."""
        exact = self.resolve(reference)
        assert exact.number is not None
        name, number = exact.name, exact.number

        def remove(journal: Journal) -> dict[str, Any]:
            refuse_deleted(journal, exact)
            uses = journal.uses_of(name, number)
            if uses:
                raise UserError(f"{exact}: {' and '.join(uses)} stand(s) on it; move or end that first")
            return {"type": "delete", "name": name, "number": number}

        self._append(remove)
        # The manifest first: from here on the version is not whole for anybody.
        self._objects.delete(f"{version_prefix(name, number)}/{MANIFEST}")
        for key in list(self._objects.keys(files_prefix(name, number))):
            self._objects.delete(key)
        return exact

    def _claim(self, name: str) -> int:
        prefix = f"adapters/{name}/versions/"
        taken = [int(key.removeprefix(prefix).split("/")[0]) for key in self._objects.keys(prefix)]
        number = max(taken, default=0) + 1
        owner = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}).encode()
        while True:
            try:
                self._objects.create(f"{version_prefix(name, number)}/claim.json", owner)
                return number
            except AlreadyExists:
                number += 1

    def _append(self, make_entry: Callable[[Journal], dict[str, Any]]) -> None:
        """Appends to the journal; `make_entry` sees the journal as it stands just before the entry."""
        while True:
            journal = self._catch_up()
            seq = journal.last_seq + 1  # before the entry is made: another thread may read on meanwhile
            entry = {**make_entry(journal), "time": time.time()}
            try:
                self._objects.create(f"journal/{seq}.json", json.dumps(entry).encode())
            except AlreadyExists:
                continue
            self._catch_up()
            return


def alias_entry(name: str, alias: str, *, number: int | None, previous: int | None, op: str) -> dict[str, Any]:
    return {"type": "alias", "name": name, "alias": alias, "number": number, "previous": previous, "op": op}


def canary_entry(name: str, alias: str, *, number: int | None, percent: float) -> dict[str, Any]:
    return {"type": "canary", "name": name, "alias": alias, "number": number, "percent": percent}


def refuse_deleted(journal: Journal, exact: Reference) -> None:
    """Another writer may have deleted it since it was resolved."""
    assert exact.number is not None
    if not journal.has(exact.name, exact.number):
        raise NotFoundError(f"{exact}: deleted; {exact.name} has {journal.versions.get(exact.name, [])}")
