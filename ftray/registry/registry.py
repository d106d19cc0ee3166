"""The registry. Layout under its location:

    adapters/NAME/versions/N/claim.json      created exclusively: this number belongs to one writer
    adapters/NAME/versions/N/files/...       a PEFT directory
    adapters/NAME/versions/N/manifest.json   written last: without it the version does not exist
    journal/SEQ.json                         created exclusively: publications and alias moves, the authority

The only primitive it needs is exclusive create, which local disks, S3, GCS and Azure all have.
"""

import difflib
import json
import os
import re
import shutil
import socket
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import platformdirs
from pydantic import ValidationError

from ftray.errors import ConflictError, FtrayError, NotFoundError, UserError
from ftray.registry.reference import Reference, check_alias, parse_reference
from ftray.storage import AlreadyExists, Manifest, ObjectStore, build_manifest, write_bytes
from ftray.storage.manifest import MANIFEST


@dataclass(frozen=True)
class AdapterVersion:
    name: str
    number: int
    manifest: Manifest

    def __str__(self) -> str:
        return f"{self.name}@{self.number}"

    @property
    def metadata(self) -> dict[str, Any]:
        return self.manifest.metadata


@dataclass
class Journal:
    """What the journal says up to `last_seq`."""

    last_seq: int = 0
    versions: dict[str, list[int]] = field(default_factory=dict)
    aliases: dict[tuple[str, str], int] = field(default_factory=dict)
    entries: list[dict[str, Any]] = field(default_factory=list)

    def apply(self, seq: int, entry: dict[str, Any]) -> None:
        if entry["type"] == "publish":
            self.versions.setdefault(entry["name"], []).append(entry["number"])
        elif entry["type"] == "alias":
            self.aliases[entry["name"], entry["alias"]] = entry["number"]
        self.entries.append({"seq": seq, **entry})
        self.last_seq = seq


class Registry:
    def __init__(self, location: str):
        refuse_vanishing_directory(location)
        self.location = location
        self._refreshing = threading.Lock()  # an endpoint asks from several threads
        self._objects = ObjectStore(location)
        self._journal = Journal()

    # -- reading -------------------------------------------------------------------------------------------------

    def refresh(self) -> Journal:
        """Follows the journal to its end: one look-up of SEQ+1 when nothing is new."""
        with self._refreshing:
            while (content := self._objects.read(f"journal/{self._journal.last_seq + 1}.json")) is not None:
                self._journal.apply(self._journal.last_seq + 1, json.loads(content))
        return self._journal

    def names(self) -> list[str]:
        return sorted(self.refresh().versions)

    def versions(self, name: str) -> list[int]:
        return sorted(self.refresh().versions.get(name, []))

    def aliases(self, name: str) -> dict[str, int]:
        journal = self.refresh()
        return {alias: number for (owner, alias), number in sorted(journal.aliases.items()) if owner == name}

    def history(self, name: str) -> list[dict[str, Any]]:
        return [entry for entry in self.refresh().entries if entry["name"] == name]

    def resolve(self, reference: str | Reference) -> Reference:
        """An alias to the version it stands for now; raises `NotFoundError` with the near names."""
        wanted = parse_reference(reference) if isinstance(reference, str) else reference
        if wanted.number is not None and wanted.number in self._journal.versions.get(wanted.name, []):
            return wanted  # versions never go away: no look at the store
        numbers = self.versions(wanted.name)
        if not numbers:
            raise NotFoundError(f"{reference}: no adapter of that name in {self.location}{self._near(wanted.name)}")
        if wanted.alias is not None:
            aliases = self.aliases(wanted.name)
            if wanted.alias not in aliases:
                have = ", ".join([*(f"{wanted.name}@{a}" for a in aliases), *(f"{wanted.name}@{n}" for n in numbers)])
                fix = f"`ftray adapters promote {wanted.name}@{numbers[-1]} {wanted.alias}` makes it"
                raise NotFoundError(f"{wanted}: no such alias; there are {have}; {fix}")
            return Reference(wanted.name, number=aliases[wanted.alias])
        if wanted.number not in numbers:
            raise NotFoundError(f"{wanted}: no such version; {wanted.name} has {', '.join(map(str, numbers))}")
        return wanted

    def get(self, reference: str | Reference) -> AdapterVersion:
        exact = self.resolve(reference)
        assert exact.number is not None
        content = self._objects.read(f"{version_prefix(exact.name, exact.number)}/{MANIFEST}")
        if content is None:
            raise FtrayError(f"{exact}: its {MANIFEST} is gone from {self.location}; restore it or publish again")
        try:
            return AdapterVersion(exact.name, exact.number, Manifest.model_validate_json(content))
        except ValidationError:
            raise FtrayError(f"{exact}: its {MANIFEST} in {self.location} is damaged; publish again") from None

    def directory(self, version: AdapterVersion) -> Path:
        """A verified local directory with the files: in place for a local registry, else a cached download."""
        prefix = f"{version_prefix(version.name, version.number)}/files"
        if self._objects.local_root is not None:
            directory = self._objects.local_root / prefix
            verify_files(directory, version)
            return directory
        owner = re.sub(r"[^A-Za-z0-9]+", "-", self.location)
        directory = Path(platformdirs.user_cache_dir("ftray")) / "adapters" / owner / version.name / str(version.number)
        if not directory.is_dir() or build_manifest(directory, metadata={}).files != version.manifest.files:
            shutil.rmtree(directory, ignore_errors=True)  # damaged, or of another registry that had this location
            for entry in version.manifest.files:
                content = self._objects.read(f"{prefix}/{entry.path}")
                if content is None:
                    raise FtrayError(f"{version}: {entry.path} is gone from {self.location}; publish again")
                write_bytes(directory / entry.path, content)
        verify_files(directory, version)
        return directory

    def _near(self, name: str) -> str:
        names = self.names()
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        if near:
            return f"; did you mean {' or '.join(near)}?"
        return f"; it has {', '.join(names[:10])}" if names else "; it is empty"

    # -- writing -------------------------------------------------------------------------------------------------

    def publish(self, name: str, directory: Path, *, metadata: dict[str, Any]) -> AdapterVersion:
        """Copies a PEFT directory in as the next version of `name`. A crash in the middle burns the number."""
        parse_reference(name)
        if "@" in name:
            raise UserError(f"{name}: publish takes a name; the registry chooses the version number")
        manifest = build_manifest(directory, metadata={**metadata, "published_at": time.time()})
        number = self._claim(name)
        prefix = version_prefix(name, number)
        for entry in manifest.files:
            self._objects.write(f"{prefix}/files/{entry.path}", directory / entry.path)
        self._objects.write(f"{prefix}/{MANIFEST}", manifest.model_dump_json(indent=2).encode())
        self._append(lambda _: {"type": "publish", "name": name, "number": number})
        return AdapterVersion(name, number, manifest)

    def promote(self, reference: str, alias: str, *, expected: int | None = None) -> Reference:
        """Points NAME@alias at a version. With `expected`, a compare-and-swap: refused if the alias moved meanwhile."""
        exact = self.resolve(reference)
        check_alias(alias, alias)

        def move(journal: Journal) -> dict[str, Any]:
            now = journal.aliases.get((exact.name, alias))
            if expected is not None and now != expected:
                raise ConflictError(f"{exact.name}@{alias}: stands at {now}, expected {expected}; look and try again")
            return {"type": "alias", "name": exact.name, "alias": alias, "number": exact.number, "previous": now}

        self._append(move)
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

    def _append(self, make_entry) -> None:
        """Appends to the journal; `make_entry` sees the journal as it stands just before the entry."""
        while True:
            journal = self.refresh()
            entry = {**make_entry(journal), "time": time.time()}
            try:
                self._objects.create(f"journal/{journal.last_seq + 1}.json", json.dumps(entry).encode())
            except AlreadyExists:
                continue
            self.refresh()
            return


def refuse_vanishing_directory(location: str) -> None:
    """`ray job submit --working-dir` unpacks into a session directory that goes away with the job."""
    if "://" not in location and "working_dir_files" in Path.cwd().parts and not Path(location).is_absolute():
        raise UserError(
            f"registry: {location!r} lies in the job's temporary working directory; "
            "give a shared absolute path (/path/on/all/nodes) or a URL"
        )


def version_prefix(name: str, number: int) -> str:
    return f"adapters/{name}/versions/{number}"


def verify_files(directory: Path, version: AdapterVersion) -> None:
    if build_manifest(directory, metadata={}).files != version.manifest.files:
        raise FtrayError(f"{version}: files in {directory} differ from their manifest; publish the adapter again")
