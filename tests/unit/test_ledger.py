"""The ledger on disks that are full, files that move, tables of others, and actors that die."""

import asyncio
import logging
import os
import sqlite3
import threading
import time
from concurrent.futures import TimeoutError as NotYet

import pytest
from fake_endpoint import EchoBackend, LocalLedger, ask, make_client
from ray.exceptions import RayActorError
from sqlalchemy.event import listen

from ftray.cli.main import main
from ftray.errors import FtrayError, UserError
from ftray.serve.http.context import RequestContext
from ftray.serve.http.ingress import Ingress
from ftray.serve.routing.handles import Receipt, RemoteLedger
from ftray.serve.routing.model_names import ModelNames
from ftray.serve.telemetry.access_log import AccessLog
from ftray.serve.tenants import database as database_module
from ftray.serve.tenants.accounts import Accounts, Tenant, Usage
from ftray.serve.tenants.auth import Authenticator
from ftray.serve.tenants.rate_limits import RateLimiter, Refusal
from ftray.serve.tenants.writer import ROW_BYTES, LedgerWriter


def usage(name: str, tokens: int = 3) -> Usage:
    return Usage(name, "acme", "support@1", tokens, 0, 2, "whole", 1.0)


@pytest.fixture
def place(tmp_path):
    return tmp_path / "tenants.db"


@pytest.fixture
def accounts(place):
    made = Accounts(str(place))
    yield made
    made.close()


class FullDisk:
    """SQLite's own error of one, while it is on."""

    def __init__(self, accounts: Accounts):
        self.is_full = False
        self._engine = accounts.database.engine
        listen(self._engine, "checkout", self._limit)

    def _limit(self, connection, *_):
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count={pages if self.is_full else 10**6}")


def test_rows_wait_in_memory_while_the_disk_is_full_and_none_is_lost(accounts, caplog):
    disk = FullDisk(accounts)
    writer = LedgerWriter(accounts.record, retry_s=0.05)
    writer.put(usage("before")).result(timeout=10)
    disk.is_full = True
    many = 600  # more than fit into the pages that are there
    rows = [writer.put(usage(f"r{number:04}" + "x" * 50)) for number in range(many)]
    with pytest.raises(NotYet):
        rows[-1].result(timeout=0.5)
    assert writer.is_failing
    assert writer.waiting_tokens("acme") == 5 * many
    disk.is_full = False
    for row in rows:
        row.result(timeout=20)
    assert accounts.usage()[0]["requests"] == many + 1
    assert not writer.is_failing
    told = [record.message for record in caplog.records if "cannot be written" in record.message]
    assert len(told) == 1
    assert "database or disk is full" in told[0]
    assert writer.close() == 0


def test_beyond_its_memory_new_requests_are_refused_and_answers_in_flight_end(registry, accounts):
    away = threading.Event()

    def write(rows):
        if away.is_set():
            raise FtrayError("no room")
        accounts.record(rows)

    keeper = RateLimiter(accounts)
    keeper.writer.close()
    keeper.writer = LedgerWriter(write, max_bytes=2 * ROW_BYTES, retry_s=0.05)

    class Queueing(LocalLedger):
        async def record(self, usage):
            self.keeper.record(usage)

    client = make_client(Ingress(ModelNames("base", registry), EchoBackend(), Authenticator(Queueing(keeper))))
    client.headers["Authorization"] = f"Bearer {accounts.create(Tenant('acme'))}"
    away.set()
    assert [ask(client, "support").status_code for _ in range(2)] == [200, 200]
    refused = ask(client, "support")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "ledger_unavailable")
    assert refused.headers["retry-after"] == "5" or refused.headers["retry-after"] == "1"
    away.clear()
    deadline = time.monotonic() + 10
    while keeper.writer.is_full and time.monotonic() < deadline:
        time.sleep(0.05)
    assert ask(client, "support").status_code == 200
    keeper.writer.close()
    assert accounts.usage()[0]["requests"] == 3


def test_a_budget_counts_what_the_database_does_not_know_yet(accounts):
    accounts.create(Tenant("acme", budget_tokens=9))
    key = accounts.rotate("acme", grace_s=0)
    now = 0.0
    keeper = RateLimiter(accounts, clock=lambda: now)
    keeper.writer.close()

    def never(rows):
        raise FtrayError("no room")

    keeper.writer = LedgerWriter(never, retry_s=0.05)
    assert isinstance(keeper.admit(key), Tenant)
    keeper.record(usage("a", tokens=10))
    now = 60.0  # the sum is read anew
    assert isinstance(keeper.admit(key), Refusal)
    assert keeper.writer.close() == 1


def test_keys_are_read_while_somebody_writes(accounts, place):
    key = accounts.create(Tenant("acme"))
    with sqlite3.connect(place) as other:
        other.execute("BEGIN IMMEDIATE")
        began = time.monotonic()
        assert accounts.tenant_of_key(key) == Tenant("acme")
        assert time.monotonic() - began < 2  # a writer's turn would be 10 s away
        other.rollback()


def test_what_is_written_is_on_the_disk(accounts):
    with accounts.database.reading() as connection:
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2  # FULL: fsync of every commit
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"


def test_a_file_that_moves_is_noticed(accounts, place, monkeypatch):
    monkeypatch.setattr(database_module, "LOOK_EVERY_S", 0.0)
    key = accounts.create(Tenant("acme"))
    accounts.record([usage("a")])
    accounts.close()
    moved = place.with_name("moved.db")
    place.rename(moved)
    for attempt in (lambda: accounts.tenant_of_key(key), lambda: accounts.record([usage("b")])):
        with pytest.raises(FtrayError, match=r"tenants.db is not there any more; put it back"):
            attempt()
    moved.rename(place)
    assert accounts.tenant_of_key(key) == Tenant("acme")
    other = Accounts(str(place.with_name("other.db")))
    new_key = other.create(Tenant("bolt"))
    other.close()
    os.replace(place.with_name("other.db"), place)
    for suffix in ("-wal", "-shm"):
        place.with_name(place.name + suffix).unlink(missing_ok=True)
    assert accounts.tenant_of_key(new_key) == Tenant("bolt")
    assert accounts.tenant_of_key(key) is None


def test_tables_of_another_version_are_named_when_it_opens(place):
    Accounts(str(place)).close()
    with sqlite3.connect(place) as connection:
        connection.execute("ALTER TABLE tenants DROP COLUMN adapters")
    with pytest.raises(UserError, match="its table tenants has no column adapters"):
        Accounts(str(place))
    later = place.with_name("later.db")
    Accounts(str(later)).close()
    with sqlite3.connect(later) as connection:
        connection.execute("INSERT INTO ftray_schema VALUES (7)")
    with pytest.raises(UserError, match="a later ftray"):
        Accounts(str(later))


def test_one_of_before_there_were_versions_is_read(place):
    made = Accounts(str(place))
    key = made.create(Tenant("acme"))
    made.close()
    with sqlite3.connect(place) as connection:
        connection.execute("DROP TABLE ftray_schema")
    assert Accounts(str(place)).tenant_of_key(key) == Tenant("acme")


def test_it_is_its_owners_alone(accounts, place):
    accounts.create(Tenant("acme"))
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in place.parent.glob("tenants.db*")}
    assert set(modes.values()) == {"0o600"}


@pytest.mark.parametrize(
    "command", [["list"], ["set", "a", "--priority", "2"], ["rotate", "a"], ["revoke", "a"]], ids=lambda c: c[0]
)
def test_a_look_makes_no_file(place, capsys, command):
    with pytest.raises(SystemExit, match="2"):
        main(["tenants", *command, "--database", str(place)])
    assert "no such file; `ftray tenants create NAME` makes it" in capsys.readouterr().err
    assert not place.exists()


class LedgerHandle:
    """Of actors, the first of which dies with what it has in memory."""

    def __init__(self):
        self.instance = 0
        self.in_memory: list[Usage] = []
        self.written: dict[str, Usage] = {}
        self.takes_at_once = False
        self.record = self

    async def remote(self, usages):
        if self.takes_at_once:
            self.written |= {one.request_id: one for one in [*self.in_memory, *usages]}
            self.in_memory.clear()
        else:
            self.in_memory += usages
        return Receipt(str(self.instance), is_written=self.takes_at_once)

    def die(self):
        self.in_memory.clear()
        self.instance += 1


@pytest.mark.parametrize("recovers", [True, False])
def test_rows_that_a_dead_ledger_had_in_memory_are_sent_to_its_successor(recovers, caplog):
    handle = LedgerHandle()
    ledger = RemoteLedger(handle)  # pyright: ignore[reportArgumentType]

    async def scenario():
        for name in "abc":
            await ledger.record(usage(name))
        if recovers:  # all three are written with the next
            handle.takes_at_once = True
            await ledger.record(usage("d"))
        handle.die()
        handle.takes_at_once = True
        await ledger.record(usage("e"))

    asyncio.run(scenario())
    assert set("abce") <= set(handle.written)
    assert ("died with 3 rows" in caplog.text) == (not recovers)


def test_a_row_that_no_ledger_takes_is_in_the_log(monkeypatch, caplog):
    monkeypatch.setattr("ftray.serve.routing.handles.LEDGER_RETRIES_S", (0.0,))

    class Dead(LedgerHandle):
        async def remote(self, usages):
            raise RayActorError

    asyncio.run(RemoteLedger(Dead()).record(usage("lost-one")))  # pyright: ignore[reportArgumentType]
    assert "usage that the ledger does not have" in caplog.text
    assert "lost-one" in caplog.text


def test_a_full_disk_under_the_access_log_is_said_once(tmp_path, caplog, capsys):
    watch = AccessLog(tmp_path / "access.jsonl")
    context = RequestContext("POST", "/v1/chat/completions", {})
    watch(context)
    file = watch._handler.stream

    class Full:
        def write(self, text):
            raise OSError(28, "No space left on device")

        flush = close = lambda self: None
        tell = seek = lambda self, *_: 0

    watch._handler.stream = Full()  # pyright: ignore[reportAttributeAccessIssue]
    for _ in range(5):
        watch(context)
    watch._handler.stream = file
    with caplog.at_level(logging.WARNING):
        watch(context)
    said = [record.message for record in caplog.records]
    assert len([message for message in said if "cannot be written" in message]) == 1
    assert "written again; it lacks 5 lines" in said[-1]
    assert capsys.readouterr().err == ""
    assert len((tmp_path / "access.jsonl").read_text().splitlines()) == 2
