"""Where a run is: as users and workers find it, and on this machine."""

import hashlib
from pathlib import Path

from ftray.storage.cache import cache_directory


def is_stored(runs_dir: str) -> bool:
    return "://" in runs_dir


def local_root(runs_dir: str) -> Path:
    """What this machine has of a `runs_dir` in a store."""
    return cache_directory() / "runs" / hashlib.sha256(runs_dir.rstrip("/").encode()).hexdigest()[:16]


def run_uri(runs_dir: str, name: str) -> str:
    """Path or URL of a run, as users and workers find it."""
    return f"{runs_dir.rstrip('/')}/{name}"


def artifact_name(*, is_adapter: bool) -> str:
    """In a run's directory: what it leaves."""
    return "adapter" if is_adapter else "model"


def local_directory(runs_dir: str, name: str) -> Path:
    """Of a run; of one in a store, what this machine has of it."""
    return local_root(runs_dir) / name if is_stored(runs_dir) else Path(runs_dir) / name
