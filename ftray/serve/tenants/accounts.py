"""Tenants, their API keys, and the usage ledger, in one database: SQLite, or PostgreSQL by URL.

Of a key only the SHA-256 is kept: it has 256 random bits, so nothing slower is needed. Every answer is one row of the
ledger under its request id; the same id again changes nothing, so recording may be retried.
"""

import hashlib
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sql
from sqlalchemy.dialects import postgresql, sqlite

from ftray.errors import ConflictError, NotFoundError, UserError
from ftray.schema import NAME_PATTERN, NAME_RULE
from ftray.serve.tenants.database import KEYS, TENANTS, USAGE, Database

KEY_PREFIX = "ftray-"


@dataclass(frozen=True)
class Tenant:
    name: str
    adapters: tuple[str, ...] | None = None  # names; None: all
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    budget_tokens: int | None = None
    priority: float = 1.0  # its share of a busy engine, against 1 of others
    is_admin: bool = False  # may load, unload and look into the endpoint

    def may_use(self, adapter: str | None) -> bool:
        """`adapter`: NAME@N; None: the base, which is everybody's."""
        return adapter is None or self.adapters is None or adapter.partition("@")[0] in self.adapters


@dataclass(frozen=True)
class Usage:
    request_id: str
    tenant: str
    model: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    outcome: str
    at: float

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


class Accounts:
    def __init__(self, database: str, *, create: bool = True):
        """`database`: a file for SQLite, or a URL such as postgresql://user@host/name. `create`: the file too."""
        self.database = Database(database, create=create)

    # -- tenants and keys ----------------------------------------------------------------------------------------

    def create(self, tenant: Tenant) -> str:
        """Returns its first key, which is told only now."""
        check_tenant(tenant)
        with self.database.changing() as connection:
            if connection.execute(sql.select(TENANTS.c.name).where(TENANTS.c.name == tenant.name)).first():
                raise ConflictError(f"{tenant.name}: there is such a tenant; `ftray tenants set` changes it")
            connection.execute(TENANTS.insert().values(row_of(tenant) | {"created_at": time.time()}))
            return add_key(connection, tenant.name)

    def change(self, name: str, changes: Mapping[str, Any]) -> Tenant:
        with self.database.changing() as connection:
            tenant = read_tenant(connection, name)
            changed = Tenant(**{**vars(tenant), **changes})
            check_tenant(changed)
            connection.execute(TENANTS.update().where(TENANTS.c.name == name).values(row_of(changed)))
        return changed

    def rotate(self, name: str, *, grace_s: float) -> str:
        """A new key; the old ones end after `grace_s`."""
        with self.database.changing() as connection:
            read_tenant(connection, name)
            end_keys(connection, KEYS.c.tenant == name, at=time.time() + grace_s)
            return add_key(connection, name)

    def revoke(self, name: str, *, hint: str | None = None) -> int:
        """Ends the tenant's keys, or the one that ends in `hint`, at once. Returns how many."""
        with self.database.changing() as connection:
            read_tenant(connection, name)
            chosen = KEYS.c.tenant == name
            return end_keys(connection, chosen & (KEYS.c.hint == hint) if hint else chosen, at=time.time())

    def tenants(self) -> list[Tenant]:
        with self.database.reading() as connection:
            return [tenant_of(row) for row in connection.execute(TENANTS.select().order_by(TENANTS.c.name))]

    def keys(self, name: str) -> list[dict[str, Any]]:
        """Those that are valid: hint, created_at, ends_at."""
        columns = (KEYS.c.hint, KEYS.c.created_at, KEYS.c.ends_at)
        chosen = sql.select(*columns).where((KEYS.c.tenant == name) & is_valid(time.time()))
        with self.database.reading() as connection:
            return [dict(row._mapping) for row in connection.execute(chosen.order_by(KEYS.c.created_at))]

    def tenant_of_key(self, key: str) -> Tenant | None:
        found = TENANTS.join(KEYS, KEYS.c.tenant == TENANTS.c.name)
        chosen = sql.select(TENANTS).select_from(found).where((KEYS.c.sha256 == digest(key)) & is_valid(time.time()))
        with self.database.reading() as connection:
            row = connection.execute(chosen).first()
        return tenant_of(row) if row is not None else None

    # -- usage ---------------------------------------------------------------------------------------------------

    def record(self, usages: Sequence[Usage]) -> None:
        """In one transaction: all or none."""
        insert = (sqlite if self.database.engine.dialect.name == "sqlite" else postgresql).insert(USAGE)
        with self.database.changing() as connection:
            connection.execute(insert.on_conflict_do_nothing(), [vars(usage) for usage in usages])

    def spent_tokens(self, tenant: str) -> int:
        total = sql.func.coalesce(sql.func.sum(USAGE.c.prompt_tokens + USAGE.c.completion_tokens), 0)
        with self.database.reading() as connection:
            return int(connection.execute(sql.select(total).where(USAGE.c.tenant == tenant)).scalar_one())

    def usage(
        self, *, tenant: str | None = None, since: float | None = None, until: float | None = None
    ) -> list[dict[str, Any]]:
        """Sums by tenant and model: requests, cut (answers that ended early), and tokens."""
        columns = [
            USAGE.c.tenant,
            USAGE.c.model,
            sql.func.count().label("requests"),
            sql.func.sum(sql.case((USAGE.c.outcome == "whole", 0), else_=1)).label("cut"),
            *(
                sql.func.sum(USAGE.c[name]).label(name)
                for name in ("prompt_tokens", "cached_tokens", "completion_tokens")
            ),
        ]
        chosen = sql.select(*columns).group_by(USAGE.c.tenant, USAGE.c.model).order_by(USAGE.c.tenant, USAGE.c.model)
        if tenant is not None:
            chosen = chosen.where(USAGE.c.tenant == tenant)
        if since is not None:
            chosen = chosen.where(USAGE.c.at >= since)
        if until is not None:
            chosen = chosen.where(USAGE.c.at < until)
        with self.database.reading() as connection:
            return [dict(row._mapping) for row in connection.execute(chosen)]

    def close(self) -> None:
        self.database.close()


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def is_valid(now: float) -> sql.ColumnElement[bool]:
    return KEYS.c.ends_at.is_(None) | (KEYS.c.ends_at > now)


def add_key(connection: sql.Connection, tenant: str) -> str:
    key = KEY_PREFIX + secrets.token_urlsafe(32)
    row = {"sha256": digest(key), "tenant": tenant, "hint": key[-4:], "created_at": time.time()}
    connection.execute(KEYS.insert().values(row))
    return key


def end_keys(connection: sql.Connection, chosen: sql.ColumnElement[bool], *, at: float) -> int:
    sooner = KEYS.c.ends_at.is_(None) | (KEYS.c.ends_at > at)
    return connection.execute(KEYS.update().where(chosen & sooner).values(ends_at=at)).rowcount


def read_tenant(connection: sql.Connection, name: str) -> Tenant:
    row = connection.execute(TENANTS.select().where(TENANTS.c.name == name)).first()
    if row is None:
        names = ", ".join(row[0] for row in connection.execute(sql.select(TENANTS.c.name)))
        raise NotFoundError(f"{name}: no such tenant; there are {names or 'none'}")
    return tenant_of(row)


def row_of(tenant: Tenant) -> dict[str, Any]:
    return vars(tenant) | {"adapters": list(tenant.adapters) if tenant.adapters is not None else sql.null()}


def tenant_of(row: Any) -> Tenant:
    fields: dict[str, Any] = {
        name: value for name, value in row._mapping.items() if name in Tenant.__dataclass_fields__
    }
    if fields["adapters"] is not None:
        fields["adapters"] = tuple(fields["adapters"])
    return Tenant(**fields)


def check_tenant(tenant: Tenant) -> None:
    if not NAME_PATTERN.fullmatch(tenant.name):
        raise UserError(f"{tenant.name!r}: a tenant's name is {NAME_RULE}")
    for adapter in tenant.adapters or ():
        if not NAME_PATTERN.fullmatch(adapter):
            raise UserError(f"{adapter!r}: an adapter's name, without version or alias, is {NAME_RULE}")
    for name in ("requests_per_minute", "tokens_per_minute", "budget_tokens", "priority"):
        value = getattr(tenant, name)
        if value is not None and value <= 0:
            raise UserError(f"{name}: {value:g} must be greater than 0")
