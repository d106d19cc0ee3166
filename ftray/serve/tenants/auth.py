"""Who asks, and whether they may: an open endpoint, or one that wants keys."""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from fastapi import HTTPException

from ftray.errors import FtrayError
from ftray.serve.tenants.accounts import Tenant, Usage
from ftray.serve.tenants.rate_limits import WANTS_KEY, Refusal

ANYBODY = Tenant("")

log = logging.getLogger("ftray.serve")


@dataclass(frozen=True)
class Caller:
    tenant: Tenant
    key: str | None  # to whom a canary stays faithful: a session, or the tenant's own user


class Ledger(Protocol):
    """`rate_limits.RateLimiter`, wherever it lives."""

    async def admit(self, key: str | None) -> Tenant | Refusal: ...

    async def identify(self, key: str | None) -> Tenant | None: ...

    async def record(self, usage: Usage) -> None: ...


class Authenticator:
    def __init__(self, ledger: Ledger | None):
        """Without a ledger the endpoint is open, and nothing is counted."""
        self.ledger = ledger

    @property
    def is_open(self) -> bool:
        return self.ledger is None

    async def admit(self, context: "Asking", *, user: str | None) -> Caller:
        """Raises 401 or 429. `user`: as the request names it."""
        headers = context.headers
        tenant = ANYBODY
        if self.ledger is not None:
            with ledger_errors():
                admitted = await self.ledger.admit(bearer(headers))
            context.tenant = admitted.tenant if isinstance(admitted, Refusal) else admitted.name
            if isinstance(admitted, Refusal):
                if admitted.status == 429 and admitted.retry_after_s is None:
                    raise BudgetSpent(admitted.status, admitted.message)
                retry = {} if admitted.retry_after_s is None else {"Retry-After": str(admitted.retry_after_s)}
                raise HTTPException(admitted.status, admitted.message, headers=retry or None)
            tenant = admitted
        session = headers.get("x-session-id") or user
        own = f"{tenant.name}/{session}" if session else tenant.name or None
        return Caller(tenant, own)

    async def tenant(self, context: "Asking") -> Tenant:
        """For what costs nothing: listing, looking. Raises 401."""
        if self.ledger is None:
            return ANYBODY
        with ledger_errors():
            tenant = await self.ledger.identify(bearer(context.headers))
        if tenant is None:
            raise HTTPException(401, WANTS_KEY)
        context.tenant = tenant.name
        return tenant

    async def require_admin(self, context: "Asking") -> None:
        """Raises 401 or 403. An open endpoint trusts whoever reaches it."""
        tenant = await self.tenant(context)
        if self.ledger is not None and not tenant.is_admin:
            raise HTTPException(403, f"{tenant.name}: only an admin's key may do this (`ftray tenants create --admin`)")

    async def record(self, usage: Usage) -> None:
        if self.ledger is not None:
            await self.ledger.record(usage)


class BudgetSpent(HTTPException):
    """To ask again does not help."""


@contextlib.contextmanager
def ledger_errors() -> Iterator[None]:
    try:
        yield
    except FtrayError as error:
        log.error("the ledger cannot be asked: %s", error)
        raise HTTPException(503, "this endpoint cannot check keys right now; try again") from None


class Headers(Protocol):
    def get(self, name: str, /) -> str | None: ...


class Asking(Protocol):
    """`context.RequestContext`, as far as the authenticator sees it. It learns who asks."""

    @property
    def headers(self) -> Headers: ...

    tenant: str


def bearer(headers: Headers) -> str | None:
    scheme, _, key = (headers.get("authorization") or "").partition(" ")
    return key.strip() or None if scheme.lower() == "bearer" else None
