"""Runs in an object store (`runs_dir: s3://...`), on the driver's side.

The driver and every rank work in a directory of their own machine, and what others read of it goes through the store:

    driver      config.json, environment.json, driver_events.jsonl, stop_request; at the end adapter/ and result.json
    rank 0      metrics.jsonl, events.jsonl, samples.jsonl, hardware.json, tensorboard/, wandb/, profile/
    each rank   its files of checkpoints/step-N, beside the training; rank 0 the manifest, when all of them are there;
                hangs/ of the rank before it, if that stood still
"""

import atexit
import contextlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from ftray.config import RunConfig
from ftray.config.renamed import with_new_names
from ftray.errors import FtrayError, UserError
from ftray.storage import ObjectStore
from ftray.storage.lease import Lease, held, is_renewed
from ftray.storage.manifest import check_objects
from ftray.storage.mirror import Mirror
from ftray.tracking.events import DRIVER_EVENTS, EVENTS
from ftray.tracking.metrics import METRICS
from ftray.tracking.report import REPORT
from ftray.tracking.runs import RESULT, TOKENS, differences
from ftray.tracking.samples import SAMPLES
from ftray.tracking.status import STATUS
from ftray.train.checkpoints.listing import Log, is_whole
from ftray.train.checkpoints.stored import StoredCheckpoints
from ftray.train.hooks.watchdog import HANGS
from ftray.train.job import HARDWARE, STOP_REQUEST, WORKER_ERROR
from ftray.train.runs.claim import with_defaults
from ftray.train.runs.handle import INPUTS, RunHandle
from ftray.train.runs.uri import local_directory, run_uri

SYNC_S = 3.0
LEASE = "driver.lease"
FRESH_IN_STORE = "--fresh: {uri} would have to be moved in its store; choose another name (name=...)"
FROM_DRIVER = ("config.json", "environment.json", INPUTS, STATUS, REPORT, DRIVER_EVENTS, STOP_REQUEST)
FROM_WORKERS = (METRICS, EVENTS, SAMPLES, HARDWARE, WORKER_ERROR)


class ObjectRunStore:
    def __init__(self, runs_dir: str):
        self._runs_dir = runs_dir

    def uri(self, name: str) -> str:
        return run_uri(self._runs_dir, name)

    def local(self, name: str) -> Path:
        return local_directory(self._runs_dir, name)

    @property
    def shared_disk(self) -> None:
        return None

    @contextlib.contextmanager
    def open(self, config: RunConfig, *, fresh: bool = False) -> Iterator["StoredRun"]:
        """One driver at a time, on whatever machine. What the store has of the run replaces what this machine had; what
        the driver wrote goes to the store at the end."""
        refusal = f"{config.name} is running already, by another driver"
        with lease_of(self.uri(config.name), refusal=refusal) as lease:
            run = StoredRun(config, fresh=fresh, lease=lease)
            try:
                yield run
            except BaseException:
                with contextlib.suppress(FtrayError, OSError):  # what went wrong is told, not that this did too
                    run.push_last()
                raise
            run.push_last()

    def share(self, tokens: Path) -> str:
        """Returns their URL."""
        url = f"{self.uri(TOKENS)}/{tokens.name}"
        store = ObjectStore(url)
        there = {found.key: found.size for found in store.entries()}
        for path in sorted(path for path in tokens.iterdir() if path.is_file()):
            if there.get(path.name) != path.stat().st_size:
                store.write(path.name, path)
        return url

    def ask_to_stop(self, name: str) -> None:
        ObjectStore(self.uri(name)).write(STOP_REQUEST, b"asked\n")

    def drop_checkpoints(self, name: str) -> None:
        StoredCheckpoints(self.uri(name)).drop()

    def forget(self, name: str) -> None:
        store = ObjectStore(self.uri(name))
        for found in store.entries():
            store.delete(found.key)
        self.forget_local_copy(name)

    def forget_leftover(self, config: RunConfig) -> None:
        """The last lines of a journal may be lost with its driver, and what then had this name may have been another
        point."""
        content = ObjectStore(self.uri(config.name)).read("config.json")
        if content is not None and any(
            differences(with_defaults(with_new_names(json.loads(content))), config.model_dump(mode="json"))
        ):
            self.forget(config.name)

    def forget_local_copy(self, name: str) -> None:
        shutil.rmtree(self.local(name), ignore_errors=True)

    def is_driven(self, name: str) -> bool:
        return is_renewed(ObjectStore(self.uri(name)), LEASE)

    def look(self) -> Path:
        seen = Path(tempfile.mkdtemp(prefix="ftray-runs-"))
        atexit.register(shutil.rmtree, seen, ignore_errors=True)
        mirror = Mirror(self._runs_dir, seen)
        keys = [found.key for found in mirror.store.entries() if found.key.count("/") == 1]
        mirror.pull(key for key in keys if not key.startswith(f"{TOKENS}/") and not key.endswith(f"/{LEASE}"))
        return seen


class StoredRun(RunHandle):
    """`lease`: of this run; None for a member of a fused group, whose sweep has one for all
    (sweep/fused/member_run.py)."""

    def __init__(self, config: RunConfig, *, fresh: bool = False, lease: Lease | None = None):
        store = ObjectRunStore(config.runs_dir)
        self._uri = store.uri(config.name)
        self.checkpoints = StoredCheckpoints(self._uri)
        self._mirror = Mirror(self._uri, store.local(config.name))
        self._lease = lease
        self._next_sync = 0.0
        self._fetch()
        super().__init__(config, self._mirror.directory, fresh=fresh)

    @property
    def uri(self) -> str:
        return self._uri

    @property
    def shared_disk(self) -> None:
        return None

    def _fetch(self) -> None:
        """For a new part of the run: what the store has replaces what this machine had."""
        shutil.rmtree(self._mirror.directory, ignore_errors=True)
        self._mirror.forget([STOP_REQUEST, HARDWARE, WORKER_ERROR, *self._mirror.store.keys(HANGS)])
        fetch_notes(self._mirror)

    def set_aside(self) -> None:
        raise UserError(FRESH_IN_STORE.format(uri=self.uri))

    def newest_checkpoint(self, *, log: Log | None = None) -> Path | None:
        """What tells of it."""
        return self.checkpoints.newest(self._mirror.directory, log=log)

    def push(self) -> None:
        self._mirror.push(FROM_DRIVER, at_once=True)

    def push_last(self) -> None:
        """Unless the run is another driver's by now."""
        if self._lease is None or self._lease.is_ours():
            self.push()

    def sync(self, *, at_once: bool = False) -> None:
        if self._lease is None or (not at_once and time.monotonic() < self._next_sync):
            return
        if self._lease.is_lost or (at_once and not self._lease.is_ours()):
            raise FtrayError(f"{self.uri}: another driver has taken this run over; this one ends")
        with contextlib.nullcontext() if at_once else contextlib.suppress(FtrayError):  # the store does not answer
            self._mirror.push(FROM_DRIVER, at_once=at_once)
            self._mirror.pull(FROM_WORKERS)
            self._mirror.take(self._mirror.store.keys(HANGS))
        self._next_sync = time.monotonic() + SYNC_S

    def verify_artifact(self) -> None:
        """As far as names and sizes tell."""
        sizes = {found.key: found.size for found in self._mirror.store.entries()}
        check_objects(self._mirror.store, self.artifact.name, sizes=sizes)

    def fetch_artifact(self, checkpoint: Path, *, whole: bool) -> None:
        if not is_whole(checkpoint):  # one that was made here is
            self.checkpoints.fetch_artifact(checkpoint, whole=whole)

    def keep_artifact(self, artifact: Path) -> None:
        self.sync(at_once=True)  # where another driver has taken over, it ends here
        self._mirror.store.write_files(artifact, artifact.relative_to(self.path).as_posix())
        self._mirror.push(FROM_DRIVER, at_once=True)
        self._mirror.push([RESULT], at_once=True)


@contextlib.contextmanager
def lease_of(url: str, *, refusal: str) -> Iterator[Lease]:
    """To be the only driver of what lies there, on whatever machine. Raises `UserError`."""
    with contextlib.ExitStack() as stack:
        try:
            lease = stack.enter_context(held(ObjectStore(url), LEASE, refusal=refusal))
        except UserError:
            raise
        except FtrayError as error:
            raise UserError(f"runs_dir: {error}; look at the address and the credentials") from None
        yield lease


def fetch_notes(mirror: Mirror) -> None:
    """The files at the top of a run directory."""
    mirror.pull(found.key for found in mirror.store.entries() if "/" not in found.key and found.key != LEASE)
