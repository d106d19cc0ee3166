"""The database of tenants and usage: where it lies, its tables, and whether it is still the one that was opened."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sql
from sqlalchemy.event import listen
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from ftray.errors import FtrayError, NotFoundError, UserError

VERSION = 1  # of the tables
LOOK_EVERY_S = 2.0  # whether a file is still in its place

tables = sql.MetaData()
TENANTS = sql.Table(
    "tenants",
    tables,
    sql.Column("name", sql.String(128), primary_key=True),
    sql.Column("adapters", sql.JSON),  # names that it may use; null: all
    sql.Column("requests_per_minute", sql.Integer),
    sql.Column("tokens_per_minute", sql.Integer),
    sql.Column("budget_tokens", sql.BigInteger),  # in all; null: no end
    sql.Column("priority", sql.Float, nullable=False),
    sql.Column("is_admin", sql.Boolean, nullable=False),
    sql.Column("created_at", sql.Float, nullable=False),
)
KEYS = sql.Table(
    "keys",
    tables,
    sql.Column("sha256", sql.String(64), primary_key=True),
    sql.Column("tenant", sql.String(128), sql.ForeignKey("tenants.name"), nullable=False),
    sql.Column("hint", sql.String(8), nullable=False),  # its last four characters, to tell keys apart
    sql.Column("created_at", sql.Float, nullable=False),
    sql.Column("ends_at", sql.Float),  # revoked, or rotated out; null: never
)
USAGE = sql.Table(
    "usage",
    tables,
    sql.Column("request_id", sql.String(64), primary_key=True),
    sql.Column("at", sql.Float, nullable=False, index=True),
    sql.Column("tenant", sql.String(128), nullable=False, index=True),
    sql.Column("model", sql.String(256), nullable=False),  # the base, or NAME@N
    sql.Column("prompt_tokens", sql.Integer, nullable=False),
    sql.Column("cached_tokens", sql.Integer, nullable=False),
    sql.Column("completion_tokens", sql.Integer, nullable=False),
    sql.Column("outcome", sql.String(16), nullable=False),  # whole | cut (the client left, or a replica died)
)
SCHEMA = sql.Table("ftray_schema", tables, sql.Column("version", sql.Integer, primary_key=True))


class Database:
    def __init__(self, location: str, *, create: bool = True):
        """`location`: a file for SQLite, or a URL such as postgresql://user@host/name. Raises `UserError` for one that
        cannot be used, `NotFoundError` where there is no file and none may be made."""
        self.location = location
        self._file = None if "://" in location else Path(location).absolute()
        if self._file is not None and not self._file.exists():
            if not create:
                raise NotFoundError(f"--database: {location}: no such file; `ftray tenants create NAME` makes it")
            make_file(self._file)
        try:
            self.engine = sql.create_engine(database_url(location, self._file), pool_pre_ping=True)
        except (SQLAlchemyError, ImportError) as error:
            raise UserError(f"tenants.database: {without_password(location)}: {error}") from None
        if self.engine.dialect.name == "sqlite":
            listen(self.engine, "connect", prepare_sqlite)
        self._looking = threading.Lock()
        self._looked_at = time.monotonic()
        self._identity = self._found()
        self._prepare()

    @contextmanager
    def reading(self) -> Iterator[sql.Connection]:
        self._check_place()
        with self._doing("read"), self.engine.connect() as connection:
            yield connection

    @contextmanager
    def changing(self) -> Iterator[sql.Connection]:
        self._check_place()
        with self._doing("written"), self.engine.begin() as connection:
            yield connection

    def close(self) -> None:
        self.engine.dispose()

    def _prepare(self) -> None:
        with self._doing("opened"):
            inspected = sql.inspect(self.engine)
            there = set(inspected.get_table_names())
            for table in (TENANTS, KEYS, USAGE):
                have = {column["name"] for column in inspected.get_columns(table.name)} if table.name in there else None
                lacking = sorted({column.name for column in table.columns} - have) if have is not None else []
                if lacking:
                    raise UserError(
                        f"tenants.database: {without_password(self.location)}: its table {table.name} has no column "
                        f"{', '.join(lacking)}: it is no ledger of ftray's, or of another version; name another file"
                    )
            tables.create_all(self.engine)
            with self.engine.begin() as connection:
                version = connection.execute(sql.select(sql.func.max(SCHEMA.c.version))).scalar()
                if version is None:
                    connection.execute(SCHEMA.insert().values(version=VERSION))
                elif version > VERSION:
                    raise UserError(
                        f"tenants.database: {without_password(self.location)} was written by a later ftray (tables of "
                        f"version {version}, here {VERSION}); use that one"
                    )

    def _found(self) -> tuple[int, int] | None:
        if self._file is None:
            return None
        found = os.stat(self._file)
        return found.st_dev, found.st_ino

    def _check_place(self) -> None:
        """A file that was moved away is written no more, one that was put in its place is opened. Raises
        `FtrayError`."""
        if self._file is None or time.monotonic() - self._looked_at < LOOK_EVERY_S:
            return
        with self._looking:
            try:
                now = self._found()
            except OSError:
                self.engine.dispose()  # what is open goes on under no name
                raise FtrayError(f"tenants.database: {self.location} is not there any more; put it back") from None
            if now != self._identity:
                self.engine.dispose()
                self._prepare()
                self._identity = now
            self._looked_at = time.monotonic()

    @contextmanager
    def _doing(self, what: str) -> Iterator[None]:
        try:
            yield
        except DBAPIError as error:
            place = without_password(self.location)
            raise FtrayError(f"tenants.database: {place} cannot be {what}: {error.orig}") from None


def make_file(path: Path) -> None:
    """For its owner alone: names and usage are nobody else's."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    except OSError as error:
        raise UserError(f"tenants.database: {path} cannot be made: {error.strerror}") from None


def database_url(location: str, file: Path | None) -> sql.URL:
    if file is not None:
        return sql.URL.create("sqlite", database=str(file))
    url = sql.make_url(location)
    return url.set(drivername="postgresql+psycopg") if url.drivername in ("postgres", "postgresql") else url


def without_password(location: str) -> str:
    return sql.make_url(location).render_as_string(hide_password=True) if "://" in location else location


def prepare_sqlite(connection: Any, _: Any) -> None:
    """Readers do not wait for a writer (WAL); what is committed is on the disk (FULL)."""
    for setting in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=10000", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {setting}")
