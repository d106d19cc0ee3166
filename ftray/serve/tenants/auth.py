"""Who asks, and whether they may: an open endpoint, or one that wants keys."""

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from ftray.errors import FtrayError
from ftray.serve.http.refusals import Refused
from ftray.serve.tenants.accounts import Tenant, Usage, digest
from ftray.serve.tenants.rate_limits import KEY_MEMORY_S, MAX_KEYS_REMEMBERED, WANTS_KEY, Refusal

ANYBODY = Tenant("")

log = logging.getLogger("ftray.serve")


@dataclass(frozen=True)
class Caller:
    tenant: Tenant
    session: str | None  # a conversation that stays with one side of a canary, as its caller names it


class Ledger(Protocol):
    """`rate_limits.RateLimiter`, wherever it lives."""

    async def admit(self, key: str | None) -> Tenant | Refusal: ...

    async def identify(self, key: str | None) -> Tenant | None: ...

    async def record(self, usage: Usage) -> None: ...


class Authenticator:
    def __init__(self, ledger: Ledger | None):
        """Without a ledger the endpoint is open, and nothing is counted."""
        self.ledger = ledger
        self._good_until: dict[str, float] = {}  # by the key's digest

    @property
    def is_open(self) -> bool:
        return self.ledger is None

    async def check_key(self, headers: "Headers") -> None:
        """Before the body is read. Raises 401."""
        key = bearer(headers)
        if self.ledger is None or (key is not None and time.monotonic() < self._good_until.get(digest(key), 0.0)):
            return
        with ledger_errors():
            tenant = await self.ledger.identify(key)
        if tenant is None or key is None:
            raise unknown_key()
        if len(self._good_until) >= MAX_KEYS_REMEMBERED:
            self._good_until.clear()
        self._good_until[digest(key)] = time.monotonic() + KEY_MEMORY_S  # `admit` looks again, for the request itself

    async def admit(self, context: "Asking") -> Caller:
        """Raises 401 or 429."""
        headers = context.headers
        tenant = ANYBODY
        if self.ledger is not None:
            with ledger_errors():
                admitted = await self.ledger.admit(bearer(headers))
            context.tenant = admitted.tenant if isinstance(admitted, Refusal) else admitted.name
            if isinstance(admitted, Refusal):
                if admitted.status == 401:
                    raise unknown_key()
                if admitted.status == 503:
                    raise unavailable(admitted.message)
                if admitted.retry_after_s is None:  # to ask again does not help
                    raise Refused(admitted.status, admitted.message, code="insufficient_quota")
                raise Refused(
                    admitted.status,
                    admitted.message,
                    code="rate_limit_exceeded",
                    headers={"Retry-After": str(admitted.retry_after_s)},
                )
            tenant = admitted
        session = headers.get("x-session-id")
        return Caller(tenant, f"{tenant.name}/{session}" if session else None)

    async def tenant(self, context: "Asking") -> Tenant:
        """For what costs nothing: listing, looking. Raises 401."""
        if self.ledger is None:
            return ANYBODY
        with ledger_errors():
            tenant = await self.ledger.identify(bearer(context.headers))
        if tenant is None:
            raise unknown_key()
        context.tenant = tenant.name
        return tenant

    async def require_admin(self, context: "Asking") -> None:
        """Raises 401 or 403. An open endpoint trusts whoever reaches it."""
        tenant = await self.tenant(context)
        if self.ledger is not None and not tenant.is_admin:
            raise Refused(403, f"{tenant.name}: only an admin's key may do this (`ftray tenants create --admin`)")

    async def record(self, usage: Usage) -> None:
        if self.ledger is not None:
            await self.ledger.record(usage)


def unknown_key() -> Refused:
    return Refused(401, WANTS_KEY, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


@contextlib.contextmanager
def ledger_errors() -> Iterator[None]:
    try:
        yield
    except FtrayError as error:
        log.error("the ledger cannot be asked: %s", error)
        raise unavailable("this endpoint cannot check keys right now; try again") from None


def unavailable(message: str) -> Refused:
    return Refused(503, message, code="ledger_unavailable", headers={"Retry-After": "1"})


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
