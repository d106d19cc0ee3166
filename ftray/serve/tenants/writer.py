"""Usage on its way to the ledger: rows that come together are written together, by a thread of its own. Where the disk
does not take them, they wait in memory, and answers go out."""

import itertools
import logging
import threading
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from ftray.errors import FtrayError
from ftray.serve.tenants.accounts import Usage

MAX_BYTES = 16 * 2**20  # of rows that wait; beyond, new requests are refused
ROW_BYTES = 600  # of one, its texts aside
MAX_TOGETHER = 1000
RETRY_S = 1.0

log = logging.getLogger("ftray.serve")


@dataclass(eq=False)
class Row:
    usage: Usage
    written: Future[None] = field(default_factory=Future)

    @property
    def num_bytes(self) -> int:
        return ROW_BYTES + len(self.usage.request_id) + len(self.usage.tenant) + len(self.usage.model)


class LedgerWriter:
    def __init__(self, write: Callable[[list[Usage]], None], *, max_bytes: int = MAX_BYTES, retry_s: float = RETRY_S):
        """`write` raises `FtrayError` where it cannot, and is asked again every `retry_s` seconds."""
        self._write = write
        self._max_bytes = max_bytes
        self._retry_s = retry_s
        self._rows: deque[Row] = deque()
        self._bytes = 0
        self._tokens: Counter[str] = Counter()  # of the rows that wait, by tenant
        self._changed = threading.Condition()
        self._closing = False
        self._reported = 0  # rows that wait, when the log was last told
        self.is_failing = False
        self._thread = threading.Thread(target=self._run, name="ftray-ledger", daemon=True)
        self._thread.start()

    def put(self, usage: Usage) -> Future[None]:
        """Its result is there once the row is on the disk."""
        row = Row(usage)
        with self._changed:
            self._rows.append(row)
            self._bytes += row.num_bytes
            self._tokens[usage.tenant] += usage.total_tokens
            if self.is_failing and len(self._rows) >= max(1, 10 * self._reported):
                self._reported = len(self._rows)
                log.warning(
                    "the ledger is not written: %d rows of usage wait in memory; if it is killed now, they are lost",
                    len(self._rows),
                )
            self._changed.notify()
        return row.written

    @property
    def is_full(self) -> bool:
        return self._bytes >= self._max_bytes

    def waiting_tokens(self, tenant: str) -> int:
        """That the database does not know of yet."""
        return self._tokens[tenant]

    def close(self, *, timeout_s: float = 10.0) -> int:
        """Writes what it can; returns how many rows are left."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout_s)
        return len(self._rows)

    def _run(self) -> None:
        while (batch := self._next()) is not None:
            try:
                self._write([row.usage for row in batch])
            except Exception as error:  # noqa: BLE001  the thread must not end; a fault of ours is in the log as well
                self._failed(error)
                with self._changed:
                    if self._closing or self._changed.wait_for(lambda: self._closing, self._retry_s):
                        return
            else:
                self._done(batch)

    def _next(self) -> list[Row] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._rows or self._closing)
            return list(itertools.islice(self._rows, MAX_TOGETHER)) or None

    def _failed(self, error: Exception) -> None:
        if not self.is_failing:  # once, however long it lasts
            reason = error if isinstance(error, FtrayError) else repr(error)
            log.error("usage cannot be written (%s); it waits in memory, answers go out", reason)
        self.is_failing = True

    def _done(self, batch: list[Row]) -> None:
        with self._changed:
            for row in batch:
                self._rows.popleft()
                self._bytes -= row.num_bytes
                self._tokens[row.usage.tenant] -= row.usage.total_tokens
            if self.is_failing and not self._rows:
                log.warning("usage is written again; nothing is lost")
                self.is_failing, self._reported = False, 0
        for row in batch:
            row.written.set_result(None)
