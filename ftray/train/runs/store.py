"""A run directory in an object store (`runs_dir: s3://...`).

The driver and every rank work in a directory of their own machine, and what others read of it goes through the store:

    driver      config.json, environment.json, driver_events.jsonl, stop_request; at the end adapter/ and result.json
    rank 0      metrics.jsonl, events.jsonl, samples.jsonl, hardware.json, tensorboard/, wandb/, profile/
    each rank   its files of checkpoints/step-N, beside the training; rank 0 the manifest, when all of them are there;
                hangs/ of the rank before it, if that stood still
"""

import atexit
import contextlib
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ftray.errors import FtrayError, UserError
from ftray.storage import ObjectStore, local_copies
from ftray.storage.cache import cache_directory
from ftray.storage.lease import Lease, held
from ftray.storage.mirror import Mirror
from ftray.tracking.events import DRIVER_EVENTS, EVENTS
from ftray.tracking.metrics import METRICS
from ftray.tracking.runs import RESULT
from ftray.tracking.samples import SAMPLES
from ftray.train.checkpoints.checkpoint import CHECKPOINTS
from ftray.train.checkpoints.stored import StoredCheckpoints
from ftray.train.hooks.watchdog import HANGS, hang_file
from ftray.train.job import HARDWARE, SCRATCH, STOP_REQUEST, TOKENS, WORKER_ERROR, TrainJob, request_stop
from ftray.train.runs.uri import is_stored, local_directory, run_uri

SYNC_S = 3.0
LEASE = "driver.lease"
WORKERS = ".workers"
FROM_DRIVER = ("config.json", "environment.json", DRIVER_EVENTS, STOP_REQUEST)
FROM_WORKERS = (METRICS, EVENTS, SAMPLES, HARDWARE, WORKER_ERROR)
OF_THIS_MACHINE = (SCRATCH, HANGS, CHECKPOINTS)  # not among a rank's notes


@contextlib.contextmanager
def lease_of(mirror: Mirror, *, refusal: str) -> Iterator[Lease]:
    """To be the only driver of what is mirrored, on whatever machine. Raises `UserError`."""
    with contextlib.ExitStack() as stack:
        try:
            lease = stack.enter_context(held(mirror.store, LEASE, refusal=refusal))
        except UserError:
            raise
        except FtrayError as error:
            raise UserError(f"runs_dir: {error}; look at the address and the credentials") from None
        yield lease


class StoredRun:
    """The driver's side. While it is `opened` nobody else writes there; of a member of a fused group
    (sweep/fused/stored_member.py) the sweep has the lease."""

    def __init__(self, runs_dir: str, name: str):
        self.url = run_uri(runs_dir, name)
        self.checkpoints = StoredCheckpoints(self.url)
        self.directory = local_directory(runs_dir, name)
        self._mirror = Mirror(self.url, self.directory)
        self._lease: Lease | None = None
        self._next_sync = 0.0

    @contextlib.contextmanager
    def opened(self, *, refusal: str) -> Iterator[None]:
        """One driver at a time, on whatever machine; raises `UserError` that begins with `refusal` for another. What
        the store has of the run replaces what this machine had; what the driver wrote goes to the store at the end."""
        with lease_of(self._mirror, refusal=refusal) as self._lease:
            self.fetch()
            try:
                yield
            except BaseException:
                with contextlib.suppress(FtrayError, OSError):  # what went wrong is told, not that this did too
                    self._push_last()
                raise
            self._push_last()

    def fetch(self) -> None:
        """For a new part of the run: what the store has replaces what this machine had."""
        shutil.rmtree(self.directory, ignore_errors=True)
        self._mirror.forget([STOP_REQUEST, HARDWARE, WORKER_ERROR, *self._mirror.store.keys(HANGS)])
        fetch_notes(self._mirror)

    def push(self) -> None:
        self._mirror.push(FROM_DRIVER, at_once=True)

    def sync(self, *, at_once: bool = False) -> None:
        if not at_once and time.monotonic() < self._next_sync:
            return
        assert self._lease is not None
        if self._lease.is_lost or (at_once and not self._lease.is_ours()):
            raise FtrayError(f"{self.url}: another driver has taken this run over; this one ends")
        with contextlib.nullcontext() if at_once else contextlib.suppress(FtrayError):  # the store does not answer
            self._mirror.push(FROM_DRIVER, at_once=at_once)
            self._mirror.pull(FROM_WORKERS)
            self._mirror.take(self._mirror.store.keys(HANGS))
        self._next_sync = time.monotonic() + SYNC_S

    def _push_last(self) -> None:
        """Unless the run is another driver's by now."""
        assert self._lease is not None
        if self._lease.is_ours():
            self.push()

    def newest_checkpoint(self) -> Path | None:
        return self.checkpoints.newest(self.directory)

    def store_artifact(self, artifact: Path) -> None:
        """The adapter or model, then the report, and last the result."""
        self._mirror.store.write_files(artifact, artifact.relative_to(self.directory).as_posix())
        self._mirror.push(["report.html", *FROM_DRIVER], at_once=True)
        self._mirror.push([RESULT], at_once=True)


class StoredHangs:
    """What ranks that stood still wrote comes to the driver."""

    def __init__(self, url: str, directory: Path):
        self._mirror = Mirror(url, directory)
        self._next_sync = 0.0

    def forget(self) -> None:
        """Of drivers before."""
        self._mirror.forget(self._mirror.store.keys(HANGS))

    def sync(self) -> None:
        if time.monotonic() > self._next_sync:
            with contextlib.suppress(FtrayError):  # the store does not answer
                self._mirror.take(self._mirror.store.keys(HANGS))
            self._next_sync = time.monotonic() + SYNC_S


def store_tokens(runs_dir: str, directory: Path) -> str:
    """Returns their URL. Runs on the same data have them in common."""
    url = f"{run_uri(runs_dir, TOKENS)}/{directory.name}"
    store = ObjectStore(url)
    there = {found.key: found.size for found in store.entries()}
    for path in sorted(path for path in directory.iterdir() if path.is_file()):
        if there.get(path.name) != path.stat().st_size:
            store.write(path.name, path)
    return url


def fetch_notes(mirror: Mirror) -> None:
    """The files at the top of a run directory."""
    mirror.pull(found.key for found in mirror.store.entries() if "/" not in found.key and found.key != LEASE)


def look_at_runs(runs_dir: str) -> Path:
    """The notes of all runs in a store, as directories of this machine."""
    seen = Path(tempfile.mkdtemp(prefix="ftray-runs-"))
    atexit.register(shutil.rmtree, seen, ignore_errors=True)
    mirror = Mirror(runs_dir, seen)
    keys = [found.key for found in mirror.store.entries() if found.key.count("/") == 1]
    mirror.pull(key for key in keys if not key.startswith(f"{TOKENS}/") and not key.endswith(f"/{LEASE}"))
    return seen


def drop_checkpoints(runs_dir: str, name: str) -> None:
    """Of a run that has its result."""
    if is_stored(runs_dir):
        StoredCheckpoints(run_uri(runs_dir, name)).drop()
    shutil.rmtree(local_directory(runs_dir, name) / CHECKPOINTS, ignore_errors=True)


def forget_run(runs_dir: str, name: str) -> None:
    """All of it, wherever it lies."""
    if is_stored(runs_dir):
        store = ObjectStore(run_uri(runs_dir, name))
        for found in store.entries():
            store.delete(found.key)
    shutil.rmtree(local_directory(runs_dir, name), ignore_errors=True)


def ask_to_stop(runs_dir: str, name: str) -> None:
    """Its workers save and end at their next step."""
    if is_stored(runs_dir):
        ObjectStore(run_uri(runs_dir, name)).write(STOP_REQUEST, b"asked\n")
    else:
        request_stop(Path(runs_dir) / name)


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


def local_copy(place: Path | str) -> Path:
    """A directory of a shared disk; of a URL, this machine's copy, which one process fetches."""
    return local_copies(cache_directory()).fetch(str(place)) if is_stored(str(place)) else Path(place)


def new_attempt() -> str:
    return uuid.uuid4().hex


def directory_of_rank(run_url: str, rank: int, *, attempt: str) -> Path:
    """A new one on this machine. If the rank before it stood still, in this part of the run, what it wrote goes to the
    store: it ended where it stood, and could send nothing itself."""
    runs_dir, _, name = run_url.rpartition("/")
    directory = local_directory(runs_dir, WORKERS) / name / f"rank-{rank}"
    path, of_attempt = hang_file(directory, rank), directory / ".attempt"
    if of_attempt.is_file() and of_attempt.read_text() == attempt and path.is_file() and path.stat().st_size:
        with contextlib.suppress(FtrayError):  # the store does not answer
            ObjectStore(run_url).write(f"{HANGS}/{path.name}", path.read_bytes())
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    of_attempt.write_text(attempt)
    return directory


@contextlib.contextmanager
def on_this_machine(job: TrainJob, *, rank: int) -> Iterator[tuple[TrainJob, WorkerNotes | None]]:
    """The job as a rank works on it: of a run in a store, in a directory of its own. What it noted is in the store at
    the end, however it ends."""
    if job.run_url is None:
        yield job, None
        return
    directory = directory_of_rank(job.run_url, rank, attempt=job.attempt)
    notes = WorkerNotes(job.run_url, directory, rank=rank)
    try:
        yield replace(job, run_directory=directory), notes
    finally:
        notes.close()
        shutil.rmtree(directory, ignore_errors=True)
