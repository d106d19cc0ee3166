"""A directory counts only if its manifest proves it: every file with size and SHA-256."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ftray.errors import DamagedError, IncompleteError
from ftray.storage.atomic import write_bytes
from ftray.storage.objects import ObjectStore

MANIFEST = "manifest.json"


class FileEntry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str  # relative, with forward slashes
    size: int
    sha256: str


class Manifest(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    files: list[FileEntry]
    metadata: dict[str, Any] = {}

    @property
    def num_bytes(self) -> int:
        return sum(entry.size for entry in self.files)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def list_files(directory: Path) -> list[FileEntry]:
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path != directory / MANIFEST)
    return [
        FileEntry(path=path.relative_to(directory).as_posix(), size=path.stat().st_size, sha256=sha256_of(path))
        for path in files
    ]


def build_manifest(directory: Path, *, metadata: dict[str, Any]) -> Manifest:
    return Manifest(files=list_files(directory), metadata=metadata)


def write_manifest(directory: Path, *, metadata: dict[str, Any], files: Sequence[FileEntry] | None = None) -> Manifest:
    """Written last: from here on the directory counts as whole. `files`: where several writers made them."""
    manifest = Manifest(files=list_files(directory) if files is None else list(files), metadata=metadata)
    write_bytes(directory / MANIFEST, manifest.model_dump_json(indent=2).encode())
    return manifest


def read_manifest(directory: Path) -> Manifest:
    path = directory / MANIFEST
    if not path.is_file():
        raise IncompleteError(f"{directory}: no {MANIFEST}; the directory was never completed")
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except ValidationError:
        raise DamagedError(f"{path}: not a manifest; the file is damaged") from None


def verify_directory(directory: Path, *, share: tuple[int, int] = (0, 1)) -> Manifest:
    """Returns the manifest when every file is there, byte for byte; raises `DamagedError` with the first that is not.

    `share`: (k, n) looks at every n-th file from the k-th on, so that n readers divide the work.
    """
    manifest = read_manifest(directory)
    for entry in manifest.files[share[0] :: share[1]]:
        path = directory / entry.path
        check_size(path, entry)
        if sha256_of(path) != entry.sha256:
            raise DamagedError(f"{path}: content differs from {MANIFEST}; the file is damaged")
    return manifest


def check_sizes(directory: Path) -> None:
    """The quick part of `verify_directory`: every file is there and as long as it should be."""
    for entry in read_manifest(directory).files:
        check_size(directory / entry.path, entry)


def check_objects(store: ObjectStore, prefix: str, *, sizes: dict[str, int]) -> None:
    """`check_sizes` of a directory in a store, whose objects have these `sizes` by key."""
    where = f"{store.location}/{prefix}"
    try:
        files = Manifest.model_validate_json(store.read(f"{prefix}/{MANIFEST}") or b"").files
    except ValidationError:
        raise DamagedError(f"{where}: has no whole {MANIFEST}") from None
    for entry in files:
        if sizes.get(f"{prefix}/{entry.path}") != entry.size:
            raise DamagedError(f"{where}/{entry.path}: is missing, or not as long as {MANIFEST} says")


def check_size(path: Path, entry: FileEntry) -> None:
    if not path.is_file():
        raise DamagedError(f"{path}: missing, though {MANIFEST} lists it")
    if path.stat().st_size != entry.size:
        raise DamagedError(f"{path}: {path.stat().st_size} bytes, {MANIFEST} says {entry.size}; the file is truncated")


def remove_unlisted(directory: Path) -> None:
    """Files that the manifest does not name."""
    listed = {entry.path for entry in read_manifest(directory).files}
    for path in [path for path in directory.rglob("*") if path.is_file() and path != directory / MANIFEST]:
        if path.relative_to(directory).as_posix() not in listed:
            path.unlink(missing_ok=True)
