"""Files that are whole or absent: atomic writes, manifests, and the object store under the registry."""

from ftray.storage.atomic import read_json, write_bytes, write_json
from ftray.storage.local_copies import LocalCopies, local_copies
from ftray.storage.manifest import (
    FileEntry,
    Manifest,
    build_manifest,
    check_sizes,
    list_files,
    read_manifest,
    remove_unlisted,
    verify_directory,
    write_manifest,
)
from ftray.storage.objects import AlreadyExists, ObjectStore

__all__ = [
    "AlreadyExists",
    "FileEntry",
    "LocalCopies",
    "Manifest",
    "ObjectStore",
    "build_manifest",
    "check_sizes",
    "list_files",
    "local_copies",
    "read_json",
    "read_manifest",
    "remove_unlisted",
    "verify_directory",
    "write_bytes",
    "write_json",
    "write_manifest",
]
