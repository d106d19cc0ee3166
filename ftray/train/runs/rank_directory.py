"""A rank's directory. Of a run on a disk it is the run's; of one in an object store it lies on the rank's machine, and
its notes go to the store."""

import contextlib
import shutil
import threading
import time
import uuid
from dataclasses import replace
from pathlib import Path

from ftray.errors import FtrayError
from ftray.storage import ObjectStore, local_copies
from ftray.storage.cache import cache_directory
from ftray.storage.mirror import Mirror
from ftray.train.checkpoints.listing import CHECKPOINTS
from ftray.train.hooks.watchdog import HANGS, hang_file
from ftray.train.job import SCRATCH, STOP_REQUEST, TrainJob
from ftray.train.runs.object_store import FROM_DRIVER, SYNC_S, fetch_notes
from ftray.train.runs.uri import is_stored, local_directory

WORKERS = ".workers"
OF_THIS_MACHINE = (SCRATCH, HANGS, CHECKPOINTS)  # not among a rank's notes


def new_attempt() -> str:
    return uuid.uuid4().hex


def directory_of_rank(uri: str, rank: int, *, attempt: str) -> Path:
    """Of a run or a fused group: on a disk all ranks have the same. In an object store a rank gets a new one on its
    machine; if the rank before it stood still, in this attempt, what it wrote goes to the store: it ended where it
    stood, and could send nothing itself."""
    if not is_stored(uri):
        return Path(uri)
    runs_dir, _, name = uri.rpartition("/")
    directory = local_directory(runs_dir, WORKERS) / name / f"rank-{rank}"
    path, of_attempt = hang_file(directory, rank), directory / ".attempt"
    if of_attempt.is_file() and of_attempt.read_text() == attempt and path.is_file() and path.stat().st_size:
        with contextlib.suppress(FtrayError):  # the store does not answer
            ObjectStore(uri).write(f"{HANGS}/{path.name}", path.read_bytes())
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    of_attempt.write_text(attempt)
    return directory


def local_copy(place: Path | str) -> Path:
    """A directory of a shared disk; of a URL, this machine's copy, which one process fetches."""
    return local_copies(cache_directory()).fetch(str(place)) if is_stored(str(place)) else Path(place)


class WorkerNotes:
    """A rank's side. Those of rank 0 go to the store every few seconds, and a request to stop comes from there."""

    def __init__(self, url: str, directory: Path, *, rank: int):
        self._rank = rank
        self._mirror = Mirror(url, directory)
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._syncing = threading.Thread(target=self._sync, name="notes", daemon=True)

    def begin(self, job: TrainJob) -> TrainJob:
        """Fetches what was noted before, and the data; returns the job with this machine's copies of them."""
        if self._rank == 0:
            fetch_notes(self._mirror)
            self.follow()
        evaluation = local_copy(job.eval_data) if job.eval_data is not None else None
        return replace(job, train_data=local_copy(job.train_data), eval_data=evaluation)

    def follow(self) -> None:
        self._syncing.start()

    def push_at_once(self) -> None:
        self._push(at_once=True)

    def close(self) -> None:
        self._ended.set()
        if self._syncing.ident is not None:
            self._syncing.join()
        self._push(at_once=True)

    def _sync(self) -> None:
        while not self._ended.wait(SYNC_S):
            with contextlib.suppress(FtrayError, OSError):  # the store does not answer, or the disk is full
                self._push(at_once=False)
                self._mirror.pull([STOP_REQUEST])

    def _push(self, *, at_once: bool) -> None:
        directory = self._mirror.directory
        files = [path.relative_to(directory) for path in directory.rglob("*") if path.is_file()]
        notes = [f.as_posix() for f in files if f.parts[0] not in OF_THIS_MACHINE and not f.name.startswith(".")]
        with self._lock:
            self._mirror.push([key for key in notes if key not in FROM_DRIVER], at_once=at_once)


class HangsOfGroup:
    """What ranks of a fused group that stood still wrote, in the driver's directory of it."""

    def __init__(self, uri: str, directory: Path):
        self._mirror = Mirror(uri, directory) if is_stored(uri) else None  # on a disk it is there already
        self._next_sync = 0.0
        if self._mirror is not None:
            self._mirror.forget(self._mirror.store.keys(HANGS))  # of drivers before

    def sync(self) -> None:
        if self._mirror is not None and time.monotonic() > self._next_sync:
            with contextlib.suppress(FtrayError):  # the store does not answer
                self._mirror.take(self._mirror.store.keys(HANGS))
            self._next_sync = time.monotonic() + SYNC_S
