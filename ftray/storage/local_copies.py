"""What lies in an object store, copied once to each machine that needs it: base models, data files.

One process fetches, others on the machine wait for it. A copy counts once its manifest is there, which is written after
everything else and never before the store is asked again whether the objects are still those that were read. The least
recently used copies go when a new one needs their room; those that a process has opened stay.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout

from ftray.errors import StoreError, UserError
from ftray.storage.manifest import MANIFEST, verify_directory, write_manifest
from ftray.storage.objects import ObjectStore, StoredObject

LIMIT = "FTRAY_CACHE_GIB"
NEVER_FILL = 0.95  # of the disk
UNITS = ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB"))

# Kept open for as long as the process lives: nobody removes what it reads.
_held: dict[Path, IO[bytes]] = {}


@dataclass(frozen=True)
class LocalCopies:
    root: Path
    limit_bytes: int | None  # of all copies together; None: what the disk holds

    def fetch(
        self,
        url: str,
        *,
        wanted: Callable[[str], bool] = lambda key: True,
        log: Callable[[str], None] = lambda text: None,
    ) -> Path:
        """A directory with the objects below `url` that are `wanted` (by their key), or with the one that it names.

        Raises `UserError` where there are none, or no room for them.
        """
        store, objects = look(url, wanted)
        directory = self.directory_of(url, objects)
        with self.claim(url, objects, wanted) as filling:
            if filling is not None:
                log(f"fetching {url} ({describe_bytes(sum(found.size for found in objects))}) into {directory}")
                for found in objects:
                    store.download(found, filling.staging / found.key)
                filling.finish()
            hold(directory)
            os.utime(directory)  # used now
        return directory

    def directory_of(self, url: str, objects: list[StoredObject]) -> Path:
        return self.root / f"{label_of(url)}-{identity(url, objects)}"

    @contextlib.contextmanager
    def claim(
        self, url: str, objects: list[StoredObject], wanted: Callable[[str], bool], *, wait: bool = True
    ) -> Iterator["Filling | None"]:
        """Others on this machine wait meanwhile. Yields None where the copy is there (by now), or, unless it is to
        `wait`, where another process makes it."""
        directory = self.directory_of(url, objects)
        self.root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{directory}.lock")
        try:
            lock.acquire(timeout=-1 if wait else 0)
        except Timeout:
            yield None
            return
        try:
            if (directory / MANIFEST).is_file():
                yield None
                return
            self._make_room(url, sum(found.size for found in objects))
            staging = directory.with_name(f"{directory.name}.part")
            shutil.rmtree(staging, ignore_errors=True)
            yield Filling(url, objects, wanted, directory, staging)
            shutil.rmtree(staging, ignore_errors=True)
        finally:
            lock.release()

    def _make_room(self, url: str, needed: int) -> None:
        """Raises `UserError` when all that nobody uses is not enough."""
        disk = shutil.disk_usage(self.root)
        for directory in sorted(self.copies(), key=used_at):
            if self._fits(needed):
                return
            remove_unless_held(directory)
        if not self._fits(needed):
            limit = "no limit is set" if self.limit_bytes is None else f"{LIMIT} is {describe_bytes(self.limit_bytes)}"
            raise UserError(
                f"{url}: needs {describe_bytes(needed)} in {self.root}; {describe_bytes(disk.free)} of the disk are "
                f"free, {limit}, and what is there is in use: make room, or raise {LIMIT}"
            )

    def _fits(self, needed: int) -> bool:
        disk = shutil.disk_usage(self.root)
        in_limit = self.limit_bytes is None or sum(map(size_of, self.copies())) + needed <= self.limit_bytes
        return in_limit and disk.used + needed <= NEVER_FILL * (disk.used + disk.free)

    def copies(self) -> list[Path]:
        return [path.parent for path in self.root.glob(f"*/{MANIFEST}")]


@dataclass(frozen=True)
class Filling:
    """A copy while it is made."""

    url: str
    objects: list[StoredObject]
    wanted: Callable[[str], bool]
    directory: Path
    staging: Path

    def write(self, key: str, start: int, part: bytes) -> None:
        path = self.staging / key
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("r+b" if path.exists() else "w+b") as file:
            file.seek(start)
            file.write(part)

    def finish(self) -> None:
        """Raises `FtrayError` where it is not what the store has."""
        for found in self.objects:
            size = (self.staging / found.key).stat().st_size if (self.staging / found.key).is_file() else -1
            if size != found.size:
                raise StoreError(f"{self.url}/{found.key}: {size} bytes arrived, the store has {found.size}")
        if look(self.url, self.wanted)[1] != self.objects:
            raise StoreError(f"{self.url}: its objects changed while they were read; try again when they stand still")
        if (self.staging / MANIFEST).is_file():  # ours, made where they were written
            verify_directory(self.staging)
        else:
            write_manifest(self.staging, metadata={"url": self.url})
        shutil.rmtree(self.directory, ignore_errors=True)  # what is left of a copy that was half removed
        os.replace(self.staging, self.directory)


def local_copies(cache: Path) -> LocalCopies:
    """With the limit of this machine's environment. Raises `UserError` where that is no number."""
    text = os.environ.get(LIMIT)
    try:
        limit = None if text is None else int(float(text) * 2**30)
    except ValueError:
        raise UserError(f"{LIMIT}: {text!r} is no number of GiB") from None
    return LocalCopies(cache / "copies", limit)


def look(url: str, wanted: Callable[[str], bool]) -> tuple[ObjectStore, list[StoredObject]]:
    """The objects, and the store that their keys belong to: below `url`, or the one that it names."""
    store = ObjectStore(url)
    found = [entry for entry in store.entries() if wanted(entry.key)]
    if found:
        return store, sorted(found, key=lambda entry: entry.key)
    parent, _, name = url.rstrip("/").rpartition("/")
    one = None
    if not parent.endswith(("/", ":")):  # a bucket has none
        store = ObjectStore(parent)
        one = store.find(name)
    if one is None:
        raise UserError(f"{url}: there is nothing of that name in the store")
    return store, [one]


def identity(url: str, objects: Iterable[StoredObject]) -> str:
    described = "\n".join([url, *(f"{found.key} {found.size} {found.tag}" for found in objects)])
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def label_of(url: str) -> str:
    return re.sub(r"[^a-z0-9.-]+", "-", url.rstrip("/").rpartition("/")[2].lower())


def hold(directory: Path) -> None:
    if directory not in _held:
        file = directory.with_name(f"{directory.name}.use").open("ab")
        fcntl.flock(file, fcntl.LOCK_SH)
        _held[directory] = file


def used_at(directory: Path) -> float:
    return directory.stat().st_mtime if directory.exists() else 0.0  # another process removes too


def remove_unless_held(directory: Path) -> None:
    """Nor while another process looks whether it is there."""
    try:
        with FileLock(f"{directory}.lock", timeout=0):
            remove_unless_open(directory)
    except Timeout:
        return


def remove_unless_open(directory: Path) -> None:
    with directory.with_name(f"{directory.name}.use").open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        (directory / MANIFEST).unlink(missing_ok=True)  # first: what is half removed is no copy
        shutil.rmtree(directory, ignore_errors=True)


def size_of(directory: Path) -> int:
    total = 0
    for path in directory.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # it is being removed
            total += path.stat().st_size if path.is_file() else 0
    return total


def describe_bytes(count: int) -> str:
    unit, name = next(((1 << power, name) for power, name in UNITS if count >= 1 << power), (1, "bytes"))
    return f"{count / unit:.1f} {name}" if unit > 1 else f"{count} bytes"
