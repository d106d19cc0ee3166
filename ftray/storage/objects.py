"""Exclusive create, read and list on a local directory or an object store (s3://, gs://, az://), through obstore."""

import os
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError
from obstore.store import LocalStore, from_url

from ftray.errors import FtrayError, StoreError
from ftray.storage.atomic import create_bytes, write_bytes

PART_BYTES = 64 << 20  # of an object, read at a time
PARTS_AT_A_TIME = 8


class AlreadyExists(FtrayError):
    """Another writer created this key first."""


@dataclass(frozen=True)
class StoredObject:
    key: str
    size: int
    tag: str | None  # changes with the content
    version: str | None = None  # of it, in stores that count them

    @property
    def state(self) -> "State":
        return state_of({"e_tag": self.tag, "version": self.version})


# How a store names what an object holds now, for `replace`: obstore's e_tag and version.
State = Any


class ObjectStore:
    """`location` is a directory or a URL; keys are relative, with forward slashes."""

    def __init__(self, location: str):
        self.location = location
        self.local_root = None if "://" in location else Path(location).absolute()

    @property
    def exists(self) -> bool:
        """A local directory appears with the first write; looking at one that is not there makes nothing."""
        return self.local_root is None or self.local_root.is_dir()

    @cached_property
    def _store(self) -> Any:
        try:
            if self.local_root is None:
                return from_url(self.location)
            return LocalStore(self.local_root, mkdir=True)
        except (BaseError, OSError, ValueError) as error:
            raise StoreError(f"{self.location}: cannot be used as a store: {first_line(error)}") from None

    def create(self, key: str, content: bytes | Path) -> State:
        """Writes a key that must not exist; exactly one of several racing writers succeeds. It is on the disk then."""
        try:
            if self.local_root is not None:
                create_bytes(self.local_root / key, content)
                return {}
            return state_of(obstore.put(self._store, key, content, mode="create", use_multipart=False))
        except (AlreadyExistsError, FileExistsError, PreconditionError):
            raise AlreadyExists(f"{self.location}/{key}: exists already") from None
        except (BaseError, OSError) as error:
            raise StoreError(f"{self.location}/{key}: cannot be written: {first_line(error)}") from None

    def replace(self, key: str, content: bytes, *, state: State) -> State:
        """Writes a key that is in this state still; raises `AlreadyExists` where another writer was first."""
        try:
            return state_of(obstore.put(self._store, key, content, mode=state, use_multipart=False))
        except (PreconditionError, FileNotFoundError):
            raise AlreadyExists(f"{self.location}/{key}: was changed by another") from None
        except (BaseError, OSError) as error:
            raise StoreError(f"{self.location}/{key}: cannot be written: {first_line(error)}") from None

    def write(self, key: str, content: bytes | Path) -> None:
        """Writes a key under a prefix this writer has claimed. It is on the disk then."""
        try:
            if self.local_root is not None:
                write_bytes(self.local_root / key, content)
            else:
                obstore.put(self._store, key, content)
        except (BaseError, OSError) as error:
            raise StoreError(f"{self.location}/{key}: cannot be written: {first_line(error)}") from None

    def write_files(self, directory: Path, prefix: str, *, without: Collection[str] = ()) -> None:
        """All files below `directory`, under `prefix`."""
        for path in sorted(path for path in directory.rglob("*") if path.is_file()):
            if (key := path.relative_to(directory).as_posix()) not in without:
                self.write(f"{prefix}/{key}", path)

    def read(self, key: str) -> bytes | None:
        """The content, or None when there is no such key."""
        if not self.exists:
            return None
        try:
            return bytes(obstore.get(self._store, key).bytes())
        except FileNotFoundError:
            return None
        except BaseError as error:
            raise StoreError(f"{self.location}/{key}: cannot be read: {first_line(error)}") from None

    def download(self, found: StoredObject, path: Path) -> None:
        """Parts side by side, each tried again where the network fails (obstore does). A short read is an error."""

        def read(start: int) -> None:
            length = min(PART_BYTES, found.size - start)
            part = memoryview(obstore.get_range(self._store, found.key, start=start, length=length))
            if len(part) != length:
                raise OSError(f"{len(part)} bytes instead of {length}")
            while part:  # a disk that fills takes a part before it fails
                written = os.pwrite(file.fileno(), part, start)
                part, start = part[written:], start + written

        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                with ThreadPoolExecutor(PARTS_AT_A_TIME) as pool:
                    list(pool.map(read, range(0, found.size, PART_BYTES)))
        except (BaseError, OSError) as error:
            raise StoreError(f"{self.location}/{found.key}: cannot be copied: {first_line(error)}") from None

    def read_part(self, key: str, start: int, length: int) -> bytes:
        try:
            return bytes(obstore.get_range(self._store, key, start=start, length=length))
        except (BaseError, OSError) as error:
            raise StoreError(f"{self.location}/{key}: cannot be read: {first_line(error)}") from None

    def find(self, key: str) -> StoredObject | None:
        """One object, without a listing."""
        try:
            item = obstore.head(self._store, key)
        except FileNotFoundError:
            return None
        except (BaseError, OSError) as error:
            raise StoreError(f"{self.location}/{key}: cannot be read: {first_line(error)}") from None
        return StoredObject(item["path"], item["size"], item["e_tag"], item["version"])

    def entries(self) -> list[StoredObject]:
        """Every key, with its size and tag, in no order."""
        if not self.exists:
            return []
        try:
            return [
                StoredObject(item["path"], item["size"], item["e_tag"])
                for batch in obstore.list(self._store)
                for item in batch
            ]
        except (BaseError, OSError) as error:
            raise StoreError(f"{self.location}: cannot be listed: {first_line(error)}") from None

    def delete(self, key: str) -> None:
        """No error when there is no such key."""
        try:
            obstore.delete(self._store, key)
        except FileNotFoundError:
            pass
        except (BaseError, OSError) as error:
            raise StoreError(f"{self.location}/{key}: cannot be deleted: {first_line(error)}") from None

    def keys(self, prefix: str) -> Iterator[str]:
        """Every key below `prefix`, in no order."""
        if not self.exists:
            return
        try:
            for batch in obstore.list(self._store, prefix=prefix):
                for item in batch:
                    yield item["path"]
        except (BaseError, OSError) as error:
            raise StoreError(f"{self.location}/{prefix}: cannot be listed: {first_line(error)}") from None


def state_of(written: Any) -> State:
    """Of what a store answers to a write, or to a look."""
    return {key: written[key] for key in ("e_tag", "version") if written.get(key) is not None}


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
