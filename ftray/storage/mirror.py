"""A directory and a place in an object store, kept alike: programs that write files write them here, and the files go
there, or come from there, when they have changed."""

import contextlib
import time
from collections.abc import Iterable
from pathlib import Path

from ftray.storage.atomic import write_bytes
from ftray.storage.objects import ObjectStore

# A file that grows is written as a whole: a large one is sent less often.
BYTES_PER_S = 4 << 20


class Mirror:
    """Of one process. Keys are paths in the directory, with forward slashes."""

    def __init__(self, url: str, directory: Path):
        self.store = ObjectStore(url)
        self.directory = directory
        self._pushed: dict[str, tuple[int, int, float]] = {}  # size, time of change, and when it was sent
        self._pulled: dict[str, str | None] = {}  # tag

    def push(self, keys: Iterable[str], *, at_once: bool = False) -> None:
        """Those files that are there and have changed. `at_once`: also those that were sent a moment ago."""
        for key in keys:
            path = self.directory / key
            with contextlib.suppress(FileNotFoundError):  # also where it goes just now
                stat = path.stat()
                size, changed, sent = self._pushed.get(key, (-1, 0, 0.0))
                due = at_once or time.monotonic() - sent > stat.st_size / BYTES_PER_S
                if due and (stat.st_size, stat.st_mtime_ns) != (size, changed):
                    self.store.write(key, path.read_bytes())
                    self._pushed[key] = (stat.st_size, stat.st_mtime_ns, time.monotonic())

    def pull(self, keys: Iterable[str]) -> None:
        """Those objects that are there and have changed."""
        for key in keys:
            found = self.store.find(key)
            if found is None or self._pulled.get(key, "") == found.tag:
                continue
            content = self.store.read(key)
            if content is not None:
                put_in_place(self.directory / key, content)
                self._pulled[key] = found.tag

    def take(self, keys: Iterable[str]) -> None:
        """Pulled, and gone from the store: the next of the same name is another, whatever it holds."""
        keys = list(keys)
        self.pull(keys)
        for key in keys:
            self.store.delete(key)
            self._pulled.pop(key, None)

    def forget(self, keys: Iterable[str]) -> None:
        """Gone on both sides."""
        for key in keys:
            self.store.delete(key)
            (self.directory / key).unlink(missing_ok=True)
            self._pulled.pop(key, None)


def put_in_place(path: Path, content: bytes) -> None:
    """A file that has only grown is appended to: who reads along keeps their place in it."""
    old = path.read_bytes() if path.is_file() else None
    if old and content.startswith(old):
        with path.open("ab") as file:
            file.write(content[len(old) :])
    else:
        write_bytes(path, content)
