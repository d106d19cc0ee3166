"""What runs leave on a disk that nobody needs: directories of Ray sessions that have ended, tokens of data sets that
were not used for long."""

import contextlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from ftray.cluster.temporary import place_of_sessions
from ftray.storage.machine import user_name
from ftray.tracking.runs import TOKENS

SESSION = re.compile(r"session_\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_\d+_\d+")
DAY_S = 86400.0


@dataclass(frozen=True)
class Leftover:
    path: Path
    kind: str  # of what
    num_bytes: int
    age_s: float  # since it was last used


def ray_directory() -> Path:
    return place_of_sessions()[0] / "ray"


def live_sessions() -> set[str]:
    """Names of sessions that some process of this machine works in."""
    found: set[str] = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            found.update(SESSION.findall(" ".join(process.cmdline())))
    return found


def old_sessions(*, older_than_s: float) -> list[Leftover]:
    directory, alive = ray_directory(), live_sessions()
    paths = [path for path in entries(directory) if SESSION.fullmatch(path.name) and path.name not in alive]
    return [found for path in paths if (found := look(path, "a Ray session")).age_s >= older_than_s and is_own(path)]


def old_tokens(runs_dir: Path, *, older_than_s: float) -> list[Leftover]:
    """Tokens that runs keep for the next run on the same data (`data/tokens.py`)."""
    places = [runs_dir / TOKENS, runs_dir / f"{TOKENS}-{user_name()}"]
    paths = [path for place in places for path in entries(place) if path.is_dir()]
    return [found for path in paths if (found := look(path, "kept tokens")).age_s >= older_than_s and is_own(path)]


def remove(leftover: Leftover) -> bool:
    """False where somebody uses it now."""
    if leftover.kind == "kept tokens":
        lock = FileLock(leftover.path.with_name(f"{leftover.path.name}.lock"))
        try:
            with lock.acquire(timeout=0):
                shutil.rmtree(leftover.path, ignore_errors=True)
        except Timeout:
            return False
        Path(lock.lock_file).unlink(missing_ok=True)
        return True
    if leftover.path.name in live_sessions():
        return False
    shutil.rmtree(leftover.path, ignore_errors=True)
    return True


def entries(directory: Path) -> Iterator[Path]:
    with contextlib.suppress(OSError):
        yield from sorted(directory.iterdir())


def is_own(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return os.geteuid() in (0, path.stat().st_uid)
    return False


def look(path: Path, kind: str) -> Leftover:
    num_bytes, used = 0, 0.0
    for place, _, files in os.walk(path):
        for file in [place, *(os.path.join(place, name) for name in files)]:
            with contextlib.suppress(OSError):
                found = os.lstat(file)
                num_bytes += found.st_blocks * 512
                used = max(used, found.st_mtime, found.st_atime if file != place else 0.0)
    return Leftover(path, kind, num_bytes, max(0.0, time.time() - used))
