"""One holder at a time of a name in an object store, where no file lock reaches: an object that its holder renews.

A holder that is gone stops renewing; after `LAPSES_S` another may take its place. Each change names the content that it
replaces (If-Match), so that of two who take it one succeeds.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ftray.errors import FtrayError, UserError
from ftray.storage.objects import AlreadyExists, ObjectStore, State

LAPSES_S = 60.0
RENEWED_EVERY_S = 10.0
LOOK_S = 1.0


@contextlib.contextmanager
def held(store: ObjectStore, key: str, *, refusal: str) -> Iterator["Lease"]:
    """Raises `UserError` that begins with `refusal` while another process holds it."""
    lease = Lease(store, key)
    lease.acquire(refusal)
    try:
        yield lease
    finally:
        lease.release()


def is_renewed(store: ObjectStore, key: str) -> bool:
    """Somebody holds it, and lives as far as the clocks of the two machines tell."""
    try:
        holder = holder_of(store, key)
    except (ValueError, FtrayError):
        return False
    return bool(holder) and not is_gone(holder) and time.time() - holder.get("at", 0) < LAPSES_S


def holder_of(store: ObjectStore, key: str) -> dict[str, Any]:
    return json.loads(store.read(key) or b"{}")


class Lease:
    def __init__(self, store: ObjectStore, key: str):
        self._store = store
        self._key = key
        self._identity = uuid.uuid4().hex
        self._state: State = {}
        self._ended = threading.Event()
        self._renewing = threading.Thread(target=self._renew, name="lease", daemon=True)
        self.is_lost = False  # this process stood still for so long that another took it

    def acquire(self, refusal: str) -> None:
        """A holder that renews it is told of within `RENEWED_EVERY_S`; one that does not is waited for."""
        end = time.monotonic() + LAPSES_S
        seen: str | None = None
        while True:
            found = self._store.find(self._key)
            holder = self._holder() if found is not None else {}
            with contextlib.suppress(AlreadyExists):
                if found is None:
                    self._state = self._store.create(self._key, self._content())
                    break
                if seen is not None and found.tag != seen:
                    raise UserError(f"{refusal} (process {holder.get('process')} on {holder.get('host')})")
                if is_gone(holder) or time.monotonic() > end:
                    self._state = self._store.replace(self._key, self._content(), state=found.state)
                    break
                seen = found.tag
            time.sleep(LOOK_S)
        self._renewing.start()

    def release(self) -> None:
        self._ended.set()
        self._renewing.join()
        with contextlib.suppress(FtrayError):
            if self.is_ours():
                self._store.delete(self._key)

    def is_ours(self) -> bool:
        """As the store has it now. Raises `FtrayError` where it does not answer."""
        self.is_lost = self.is_lost or self._holder().get("holder") != self._identity
        return not self.is_lost

    def _renew(self) -> None:
        while not self._ended.wait(RENEWED_EVERY_S) and not self.is_lost:
            with contextlib.suppress(FtrayError):  # the store does not answer: it is tried again
                self._renew_once()

    def _renew_once(self) -> None:
        try:
            self._state = self._store.replace(self._key, self._content(), state=self._state)
        except AlreadyExists:
            found = self._store.find(self._key)
            if found is None or self._holder().get("holder") != self._identity:
                self.is_lost = True
            else:  # the store took the last one, and its answer was lost
                self._state = found.state

    def _holder(self) -> dict[str, Any]:
        return holder_of(self._store, self._key)

    def _content(self) -> bytes:
        return json.dumps(describe_process() | {"holder": self._identity, "at": time.time()}).encode()


def describe_process() -> dict[str, Any]:
    """`machine`: where process numbers mean the same: a container has its own, and two machines may share a name."""
    try:
        machine = Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux: a name that no other process has
        machine = uuid.uuid4().hex
    return {"host": socket.gethostname(), "machine": machine, "process": os.getpid()}


def is_gone(holder: dict[str, Any]) -> bool:
    """It was a process of this machine, since it was started last, and has ended."""
    own = describe_process()
    if any(holder.get(key) != own[key] for key in ("host", "machine")):
        return False
    try:
        os.kill(holder["process"], 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False
