"""Reading a registry: following its journal, resolving names, and verified local directories."""

import difflib
import logging
import re
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from pydantic import ValidationError

from ftray.errors import DamagedError, FtrayError, NotFoundError, UserError
from ftray.registry.chain import Chain, digest_of, entry_key
from ftray.registry.journal import Canary, Journal
from ftray.registry.reference import Reference, parse_reference
from ftray.storage import Manifest, ObjectStore, build_manifest, write_bytes
from ftray.storage.cache import cache_directory
from ftray.storage.job_directory import vanishes_with_the_job
from ftray.storage.manifest import MANIFEST

NEWS_S = 0.5
CONFIRMED_EVERY_S = 10.0  # by an endpoint: that the journal it knows is the one that is there
ENTRY = re.compile(r"journal/([1-9]\d*)\.json")
VERSION = re.compile(r"[1-9]\d{0,8}")

log = logging.getLogger("ftray.registry")


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


class RegistryReader:
    def __init__(self, location: str, *, tolerant: bool = False):
        """`tolerant`, for an endpoint: a remote store is asked for news at most every `NEWS_S`, and while a store does
        not answer, what is known goes on being used."""
        refuse_vanishing_directory(location)
        self.location = location
        self._refreshing = threading.Lock()  # an endpoint asks from several threads
        self._objects = ObjectStore(location)
        self._journal = Journal()
        self._chain = Chain(location)
        self._confirmed_at = float("-inf")
        self._logged: str | None = None
        self._tolerant = tolerant
        self._max_age_s = NEWS_S if tolerant and self._objects.local_root is None else 0.0
        self._looked_at = float("-inf")

    @property
    def known(self) -> Journal:
        """The journal as far as it was last followed; no look at the store."""
        return self._journal

    def refresh(self, *, force: bool = False) -> Journal:
        """Follows the journal to its end: one look-up of SEQ+1 when nothing is new."""
        with self._refreshing:
            if not force and time.monotonic() - self._looked_at < self._max_age_s:
                return self._journal
            try:
                self._read_on()
                self._logged = None
            except FtrayError as error:
                if not self._tolerant or self._journal.last_seq == 0:
                    raise
                if str(error) != self._logged:  # once, not with every request
                    log.warning("the registry's last known state is used: %s", error)
                self._logged = str(error)
            self._looked_at = time.monotonic()
        return self._journal

    def _read_on(self) -> None:
        """Raises `DamagedError` where the journal has a gap, or an entry that does not follow; nothing is applied on
        top of either."""
        began = self._journal.last_seq
        self._follow()
        if began == 0:
            self._refuse_gap()
        elif self._tolerant and time.monotonic() - self._confirmed_at > CONFIRMED_EVERY_S:
            self._confirm()

    def _follow(self) -> None:
        while (content := self._objects.read(entry_key(self._journal.last_seq + 1))) is not None:
            self._chain.follow(self._journal, content)

    def _refuse_gap(self) -> None:
        """One listing, when the journal is first read."""
        last = max(self._entries(), default=0)
        self._follow()  # what was written while it was listed
        missing = self._journal.last_seq + 1
        if last >= missing:
            raise self._chain.damaged(missing, f"is missing, and there are entries after it (the last is {last}.json)")

    def _confirm(self) -> None:
        """The last entry that this reader knows is the one that is there. Raises `DamagedError`."""
        seq = self._journal.last_seq
        content = self._objects.read(entry_key(seq)) if seq else None
        if seq and (content is None or digest_of(content) != self._chain.last):
            raise self._chain.damaged(seq, "is not what this process read there: the journal was put back or replaced")
        self._confirmed_at = time.monotonic()

    def _entries(self) -> list[int]:
        """The numbers of the journal's entries that are there. Other names are passed over."""
        return [int(found[1]) for key in self._objects.keys("journal") if (found := ENTRY.fullmatch(key))]

    def names(self) -> list[str]:
        return sorted(self.refresh().versions)

    def versions(self, name: str) -> list[int]:
        return sorted(self.refresh().versions.get(name, []))

    def aliases(self, name: str) -> dict[str, int]:
        journal = self.refresh()
        return {alias: number for (owner, alias), number in sorted(journal.aliases.items()) if owner == name}

    def canaries(self, name: str) -> dict[str, Canary]:
        return {alias: canary for (owner, alias), canary in sorted(self.refresh().canaries.items()) if owner == name}

    def tags(self, name: str, number: int) -> list[str]:
        return self.refresh().tags.get((name, number), [])

    def history(self, name: str) -> list[dict[str, Any]]:
        return [entry for entry in self.refresh().entries if entry["name"] == name]

    def resolve(self, reference: str | Reference) -> Reference:
        """An alias to the version it stands for now; raises `NotFoundError` with the near names."""
        wanted = parse_reference(reference) if isinstance(reference, str) else reference
        try:
            return self._resolve(wanted)
        except NotFoundError:
            if not self._max_age_s:
                raise
            self.refresh(force=True)  # another process may know of it already
            return self._resolve(wanted)

    def _resolve(self, wanted: Reference) -> Reference:
        if wanted.number is not None and self._journal.has(wanted.name, wanted.number):
            return wanted  # no look at the store: versions do not change
        numbers = self.versions(wanted.name)
        if not numbers:
            raise NotFoundError(f"{wanted}: no adapter of that name in {self.location}{self._near(wanted.name)}")
        if wanted.alias is not None:
            aliases = self.aliases(wanted.name)
            if wanted.alias not in aliases:
                have = ", ".join([*(f"{wanted.name}@{a}" for a in aliases), *(f"{wanted.name}@{n}" for n in numbers)])
                fix = f"`ftray adapters promote {wanted.name}@{numbers[-1]} {wanted.alias}` makes it"
                raise NotFoundError(f"{wanted}: no such alias; there are {have}; {fix}")
            return Reference(wanted.name, number=aliases[wanted.alias])
        if wanted.number not in numbers:
            what = "deleted" if (wanted.name, wanted.number) in self._journal.deleted else "no such version"
            raise NotFoundError(f"{wanted}: {what}; {wanted.name} has {', '.join(map(str, numbers))}")
        return wanted

    def get(self, reference: str | Reference) -> AdapterVersion:
        exact = self.resolve(reference)
        assert exact.number is not None
        content = self._objects.read(f"{version_prefix(exact.name, exact.number)}/{MANIFEST}")
        if content is None:
            raise DamagedError(f"{exact}: its {MANIFEST} is gone from {self.location}; restore it or publish again")
        published = self.known.manifests.get((exact.name, exact.number))
        if published is not None and digest_of(content) != published:
            raise DamagedError(
                f"{exact}: its {MANIFEST} in {self.location} is not the one that was published; restore it, or publish "
                "again"
            )
        try:
            return AdapterVersion(exact.name, exact.number, Manifest.model_validate_json(content))
        except ValidationError:
            raise DamagedError(f"{exact}: its {MANIFEST} in {self.location} is damaged; publish again") from None

    def directory(self, version: AdapterVersion) -> Path:
        """A verified local directory with the files: in place for a local registry, else a cached download."""
        prefix = files_prefix(version.name, version.number)
        if self._objects.local_root is not None:
            directory = self._objects.local_root / prefix
            verify_files(directory, version)
            return directory
        owner = re.sub(r"[^A-Za-z0-9]+", "-", self.location)
        directory = cache_directory() / "adapters" / owner / version.name / str(version.number)
        directory.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(directory.parent / f".{version.number}.lock"):  # other replicas of this host wait, and find it
            if not directory.is_dir() or not has_files(directory, version):
                self._download(version, directory)
                verify_files(directory, version)
        return directory

    def verify(self, version: AdapterVersion) -> None:
        """Byte for byte where it lies, whatever a cache here holds. Raises `DamagedError`."""
        if self._objects.local_root is not None:
            self.directory(version)
            return
        for entry in version.manifest.files:
            content = self._objects.read(f"{files_prefix(version.name, version.number)}/{entry.path}")
            if content is None or digest_of(content) != entry.sha256:
                raise DamagedError(
                    f"{version}: {entry.path} in {self.location} differs from its manifest; publish again"
                )

    def place(self, version: AdapterVersion) -> str:
        """A path or URL of the files, for other machines."""
        return f"{self._objects.local_root or self.location.rstrip('/')}/{files_prefix(version.name, version.number)}"

    def _download(self, version: AdapterVersion, directory: Path) -> None:
        shutil.rmtree(directory, ignore_errors=True)  # damaged, or of another registry that had this location
        for entry in version.manifest.files:
            content = self._objects.read(f"{files_prefix(version.name, version.number)}/{entry.path}")
            if content is None:
                raise DamagedError(f"{version}: {entry.path} is gone from {self.location}; publish again")
            write_bytes(directory / entry.path, content)

    def _near(self, name: str) -> str:
        names = self.names()
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        if near:
            return f"; did you mean {' or '.join(near)}?"
        return f"; it has {', '.join(names[:10])}" if names else "; it is empty"


def refuse_vanishing_directory(location: str) -> None:
    if vanishes_with_the_job(location):
        raise UserError(
            f"registry: {location!r} lies in the job's temporary working directory; "
            "give a shared absolute path (/path/on/all/nodes) or a URL"
        )


def version_prefix(name: str, number: int) -> str:
    return f"adapters/{name}/versions/{number}"


def files_prefix(name: str, number: int) -> str:
    return f"{version_prefix(name, number)}/files"


def has_files(directory: Path, version: AdapterVersion) -> bool:
    return build_manifest(directory, metadata={}).files == version.manifest.files


def verify_files(directory: Path, version: AdapterVersion) -> None:
    if not has_files(directory, version):
        raise DamagedError(f"{version}: files in {directory} differ from their manifest; publish the adapter again")
