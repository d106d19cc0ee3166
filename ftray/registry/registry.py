"""The registry. Layout under its location:

    adapters/NAME/versions/N/claim.json      created exclusively: this number belongs to one writer
    adapters/NAME/versions/N/files/...       a PEFT directory
    adapters/NAME/versions/N/manifest.json   written last: without it the version does not exist
    journal/SEQ.json                         created exclusively: all that ever happened (`journal.py`), the authority

The only primitive it needs is exclusive create, which local disks, S3, GCS and Azure all have.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ftray.errors import ConflictError, DamagedError, NotFoundError, UserError
from ftray.registry.chain import SEQ, digest_of, entry_key
from ftray.registry.journal import Canary, CanaryLimits, Journal
from ftray.registry.reader import VERSION, AdapterVersion, RegistryReader, files_prefix, version_prefix
from ftray.registry.reference import Reference, check_alias, check_tag, parse_reference
from ftray.storage import AlreadyExists, build_manifest
from ftray.storage.machine import user_name
from ftray.storage.manifest import MANIFEST

# Loads a PEFT directory as an engine does; raises where it cannot. The rooms that know how are above this one.
Loads = Callable[[Path], object]


class Registry(RegistryReader):
    def publish(self, name: str, directory: Path, *, metadata: dict[str, Any]) -> AdapterVersion:
        """Copies a PEFT directory in as the next version of `name`. A crash in the middle burns the number."""
        parse_reference(name)
        if "@" in name:
            raise UserError(f"{name}: publish takes a name; the registry chooses the version number")
        manifest = build_manifest(directory, metadata={**metadata, "published_at": time.time()})
        number = self._claim(name)
        for file in manifest.files:
            self._objects.write(f"{files_prefix(name, number)}/{file.path}", directory / file.path)
        content = manifest.model_dump_json(indent=2).encode()
        self._objects.write(f"{version_prefix(name, number)}/{MANIFEST}", content)
        entry = {"type": "publish", "name": name, "number": number, "manifest": digest_of(content)}
        self._append(lambda _: entry)
        return AdapterVersion(name, number, manifest)

    def promote(
        self,
        reference: str,
        alias: str,
        *,
        expected: int | None = None,
        reason: str | None = None,
        force: bool = False,
        loads: Loads | None = None,
    ) -> Reference:
        """Points NAME@alias at a version, once its files are those that were published, `loads` takes them, and its
        base is that of the version before (`force`: without a look). With `expected`, a compare-and-swap: refused if
        the alias moved meanwhile. Raises `DamagedError` or `UserError`; the alias then stands where it stood."""
        exact = self.resolve(reference)
        check_alias(alias, alias)

        def move(journal: Journal) -> dict[str, Any]:
            refuse_deleted(journal, exact)
            if not force:
                self._check_servable(exact, alias, journal, loads)
            now = journal.aliases.get((exact.name, alias))
            if expected is not None and now != expected:
                raise ConflictError(f"{exact.name}@{alias}: stands at {now}, expected {expected}; look and try again")
            return alias_entry(exact.name, alias, number=exact.number, previous=now, op="promote")

        self._append(move, reason=reason)
        return exact

    def rollback(
        self, name: str, alias: str, *, reason: str | None = None, force: bool = False, loads: Loads | None = None
    ) -> tuple[Reference, Reference]:
        """Points the alias at the version it stood at before; again, at the one before that. Returns (from, to). It is
        looked at as `promote` does."""
        moved: list[int] = []

        def move(journal: Journal) -> dict[str, Any]:
            now, before = journal.aliases.get((name, alias)), journal.before(name, alias)
            if now is None:
                self.resolve(Reference(name, alias=alias))  # names what there is
                raise NotFoundError(f"{name}@{alias}: no such alias")
            if before is None:
                raise UserError(f"{name}@{alias}: has only ever stood at {now}; there is nothing to go back to")
            if not force:
                self._check_servable(Reference(name, number=before), alias, journal, loads)
            moved[:] = [now, before]
            return alias_entry(name, alias, number=before, previous=now, op="rollback")

        self._append(move, reason=reason)
        return Reference(name, number=moved[0]), Reference(name, number=moved[1])

    def set_canary(
        self, reference: str, alias: str, percent: float, limits: CanaryLimits, *, loads: Loads | None = None
    ) -> Reference:
        """A share of the requests for NAME@alias goes to another version, which is looked at as `promote` does.
        `percent` in (0, 100)."""
        exact = self.resolve(reference)

        def start(journal: Journal) -> dict[str, Any]:
            refuse_deleted(journal, exact)
            stable = journal.aliases.get((exact.name, alias))
            if stable is None:
                raise NotFoundError(f"{exact.name}@{alias}: no such alias; promote a version to it first")
            if stable == exact.number:
                raise UserError(f"{exact}: is what {exact.name}@{alias} stands at; a canary is another version")
            self._check_servable(exact, alias, journal, loads)
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

        def mark(journal: Journal) -> dict[str, Any]:
            refuse_deleted(journal, exact)
            return entry

        self._append(mark)
        return self.tags(exact.name, exact.number)

    def refuse_used(self, exact: Reference) -> None:
        """Raises `UserError` while an alias or a canary stands on it."""
        refuse_used(self.refresh(), exact)

    def delete(self, reference: str, *, force: bool = False) -> Reference:
        """For good: the files go, the number is never used again. Refused while an alias or a canary stands on it;
        with `force` those go too."""
        exact = self.resolve(reference)
        assert exact.number is not None
        name, number = exact.name, exact.number

        def remove(journal: Journal) -> dict[str, Any]:
            refuse_deleted(journal, exact)
            if not force:
                refuse_used(journal, exact)
            return {"type": "delete", "name": name, "number": number}

        self._append(remove)
        # The manifest first: from here on the version is not whole for anybody.
        self._objects.delete(f"{version_prefix(name, number)}/{MANIFEST}")
        for key in list(self._objects.keys(files_prefix(name, number))):
            self._objects.delete(key)
        return exact

    def _claim(self, name: str) -> int:
        prefix = f"adapters/{name}/versions/"
        found = (key.removeprefix(prefix).split("/")[0] for key in self._objects.keys(prefix))
        number = max((int(name) for name in found if VERSION.fullmatch(name)), default=0) + 1
        owner = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}).encode()
        while True:
            try:
                self._objects.create(f"{version_prefix(name, number)}/claim.json", owner)
                return number
            except AlreadyExists:
                number += 1

    def _check_servable(self, exact: Reference, alias: str, journal: Journal, loads: Loads | None) -> None:
        """Raises `DamagedError` where its files are not those that were published, `UserError` where the version that
        the alias stands at has another base, and what `loads` raises."""
        version = self.get(exact)
        self.verify(version)
        directory = self.directory(version)
        if loads is not None:
            loads(directory)
        now = journal.aliases.get((exact.name, alias))
        with contextlib.suppress(DamagedError):  # what stands there now is not known: nothing to compare with
            before = self.get(Reference(exact.name, number=now)).metadata if now is not None else {}
            ours, theirs = (metadata.get("base_fingerprint") for metadata in (version.metadata, before))
            if ours and theirs and ours != theirs:
                raise UserError(
                    f"{exact}: was trained on {version.metadata.get('base_model')}, and {exact.name}@{alias} stands at "
                    f"version {now}, whose base is {before.get('base_model')}: an endpoint has one of them; "
                    "choose another alias, or --force where the endpoint's base changes as well"
                )

    def _append(self, make_entry: Callable[[Journal], dict[str, Any]], *, reason: str | None = None) -> None:
        """Appends to the journal; `make_entry` sees the journal as it stands just before the entry."""
        said = {"author": author()} | ({"reason": reason} if reason else {})
        while True:
            with self._refreshing:  # another thread may read on afterwards: then this number is taken
                self._read_on()
                self._confirm()
                link = self._chain.link(self._journal.last_seq + 1)
            entry = {**make_entry(self._journal), "time": time.time(), **said, **link}
            try:
                self._objects.create(entry_key(link[SEQ]), json.dumps(entry).encode())
            except AlreadyExists:
                continue
            with self._refreshing:
                self._read_on()
            return


def author() -> str:
    """USER@HOST, as the journal keeps it."""
    return f"{user_name()}@{socket.gethostname()}"


def alias_entry(name: str, alias: str, *, number: int | None, previous: int | None, op: str) -> dict[str, Any]:
    return {"type": "alias", "name": name, "alias": alias, "number": number, "previous": previous, "op": op}


def canary_entry(name: str, alias: str, *, number: int | None, percent: float) -> dict[str, Any]:
    return {"type": "canary", "name": name, "alias": alias, "number": number, "percent": percent}


def refuse_used(journal: Journal, exact: Reference) -> None:
    assert exact.number is not None
    if uses := journal.uses_of(exact.name, exact.number):
        standing = f"{' and '.join(uses)} stand{'s' if len(uses) == 1 else ''} on it"
        raise UserError(f"{exact}: {standing}; move or end that first, or take it away as well with --force")


def refuse_deleted(journal: Journal, exact: Reference) -> None:
    """Another writer may have deleted it since it was resolved."""
    assert exact.number is not None
    if not journal.has(exact.name, exact.number):
        raise NotFoundError(f"{exact}: deleted; {exact.name} has {journal.versions.get(exact.name, [])}")
