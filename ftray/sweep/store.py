"""A sweep's directory in an object store (`runs_dir: s3://...`). The driver works in one of its machine, and a thread
keeps both alike:

    driver      what lies at the top: sweep.json, trials.jsonl (the journal), comparison.json, sweep.html, ...
    users       requests/, of `ftray sweep stop-trial` and `clone-trial`, from whatever machine
    trials/     run directories, each with the store by itself (train/runs/store.py)
"""

import contextlib
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from ftray.config import RunConfig
from ftray.errors import FtrayError, NotFoundError, UserError
from ftray.storage.lease import Lease
from ftray.storage.mirror import Mirror
from ftray.sweep.requests import REQUESTS
from ftray.tracking.jobs import JOURNAL, SWEEP
from ftray.train.runs.claim import holding, lock_of
from ftray.train.runs.handle import set_aside
from ftray.train.runs.object_store import FRESH_IN_STORE, fetch_notes, lease_of
from ftray.train.runs.store import run_store
from ftray.train.runs.uri import is_stored, local_directory, run_uri

SYNC_S = 3.0


class StoredSweep:
    """The driver's side."""

    def __init__(self, runs_dir: str, name: str):
        self.url = run_uri(runs_dir, name)
        self.directory = local_directory(runs_dir, name)
        self._mirror = Mirror(self.url, self.directory)
        self._requests: set[str] = set()  # keys of those that were fetched
        self._ended = threading.Event()

    @contextlib.contextmanager
    def opened(self, *, refusal: str) -> Iterator[None]:
        """One driver at a time, on whatever machine; raises `UserError` that begins with `refusal` for another. What
        the store has replaces what this machine had."""
        with lease_of(self.url, refusal=refusal) as lease:
            shutil.rmtree(self.directory, ignore_errors=True)
            fetch_notes(self._mirror)
            self._sync_once()
            syncing = threading.Thread(target=self._sync, args=[lease], name="sweep-store", daemon=True)
            syncing.start()
            try:
                yield
            except BaseException:
                with contextlib.nullcontext() if lease.is_lost else contextlib.suppress(FtrayError, OSError):
                    self._end(lease, syncing)
                raise
            self._end(lease, syncing)

    def _end(self, lease: Lease, syncing: threading.Thread) -> None:
        self._ended.set()
        syncing.join()
        if not lease.is_ours():
            raise FtrayError(f"{self.url}: another driver has taken this sweep over; this one ends")
        self._sync_once()

    def _sync(self, lease: Lease) -> None:
        while not self._ended.wait(SYNC_S):
            with contextlib.suppress(FtrayError, OSError):  # the store does not answer, or the disk is full
                if not lease.is_ours():
                    main = threading.main_thread().ident
                    assert main is not None
                    signal.pthread_kill(main, signal.SIGINT)  # ends it as Ctrl-C does; `_end` tells why
                    return
                self._sync_once()

    def _sync_once(self) -> None:
        """A request leaves the store once the journal that tells of it is there: the study removes its own copy when it
        has written that."""
        taken_up = {key for key in self._requests if not (self.directory / key).exists()}
        at_the_top = [path.name for path in self.directory.glob("*") if path.is_file() and path.name[0] != "."]
        self._mirror.push(at_the_top, at_once=self._ended.is_set())
        if JOURNAL in at_the_top:
            self._mirror.push([JOURNAL], at_once=True)
        for key in taken_up:
            self._mirror.store.delete(key)
        self._requests -= taken_up
        new = set(self._mirror.store.keys(REQUESTS)) - self._requests - taken_up
        self._mirror.pull(new)
        self._requests |= new


@contextlib.contextmanager
def opened_sweep(run: RunConfig, *, fresh: bool) -> Iterator[Path]:
    """The sweep's directory, on this machine, whose only driver this process is meanwhile. `run`: it has the sweep's
    name and place. `fresh`: an earlier one is set aside. Raises `UserError`."""
    directory = run_store(run.runs_dir).local(run.name).absolute()
    if not is_stored(run.runs_dir):
        with holding(lock_of(run.runs_dir, run.name), stop_with="Ctrl-C where it was started"):
            if fresh and directory.exists():
                set_aside(directory)
            yield directory
        return
    stored = StoredSweep(run.runs_dir, run.name)
    with stored.opened(refusal=f"{run.name} is running already, by another driver"):
        if fresh and directory.exists():
            raise UserError(FRESH_IN_STORE.format(uri=stored.url))
        yield directory


@contextlib.contextmanager
def local_sweep(runs_dir: str, name: str) -> Iterator[Path]:
    """The directory of a sweep, for those who are not its driver. What they ask for in it goes to the store at the
    end. Raises `NotFoundError`."""
    if not is_stored(runs_dir):
        yield Path(runs_dir) / name
        return
    with tempfile.TemporaryDirectory(prefix="ftray-sweep-") as temporary:
        seen = Path(temporary)
        mirror = Mirror(run_uri(runs_dir, name), seen)
        mirror.pull([SWEEP, JOURNAL])
        if not (seen / SWEEP).is_file():
            raise NotFoundError(f"{name}: no such sweep in {runs_dir}")
        yield seen
        mirror.push(path.relative_to(seen).as_posix() for path in (seen / REQUESTS).glob("*"))
