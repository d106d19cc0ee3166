"""What a tenant may still do right now: request and token rates, and its budget. One object for an endpoint, in the
actor that keeps the ledger, so that limits hold however many ingresses there are."""

import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from ftray.serve.tenants.accounts import Accounts, Tenant, Usage, digest
from ftray.serve.tenants.writer import LedgerWriter

KEY_MEMORY_S = 2.0  # how long a key is believed without a look at the database: a revoked one works at most so long
MAX_KEYS_REMEMBERED = 10_000
SPENT_MEMORY_S = 10.0
WANTS_KEY = "this endpoint wants a valid API key: Authorization: Bearer ftray-..."


@dataclass(frozen=True)
class Refusal:
    status: int
    message: str
    retry_after_s: int | None = None
    tenant: str = ""  # where the key was good


class Bucket:
    """A rate limit that allows bursts of a minute's worth. It may be overdrawn: what an answer costs is known late."""

    def __init__(self, per_minute: int, now: float):
        self.per_minute = per_minute
        self._level, self._at = float(per_minute), now

    def take(self, amount: float, now: float) -> None:
        self._fill(now)
        self._level -= amount

    def wait_s(self, amount: float, now: float) -> float:
        """Until `amount` is there."""
        self._fill(now)
        return max(0.0, (amount - self._level) * 60 / self.per_minute)

    def _fill(self, now: float) -> None:
        self._level = min(self.per_minute, self._level + (now - self._at) * self.per_minute / 60)
        self._at = now


class RateLimiter:
    def __init__(self, accounts: Accounts, *, clock: Callable[[], float] = time.monotonic):
        self._accounts = accounts
        self._clock = clock
        self._keys: dict[str, tuple[float, Tenant | None]] = {}
        self._requests: dict[str, Bucket] = {}
        self._tokens: dict[str, Bucket] = {}
        self._spent: dict[str, tuple[float, int]] = {}
        self._lock = threading.Lock()  # several threads call
        self.writer = LedgerWriter(accounts.record)

    def admit(self, key: str | None) -> Tenant | Refusal:
        """A request of whoever holds this key: counted, or refused."""
        tenant = self.identify(key)
        if tenant is None:
            return Refusal(401, WANTS_KEY)
        if self.writer.is_full:
            message = "this endpoint's ledger cannot be written, and no more usage can wait for it; try again"
            return Refusal(503, message, retry_after_s=5, tenant=tenant.name)
        spent = self._spent_by(tenant.name) if tenant.budget_tokens is not None else 0
        with self._lock:
            return self._limited(tenant, spent)

    def _limited(self, tenant: Tenant, spent: int) -> Tenant | Refusal:
        now, name = self._clock(), tenant.name
        if tenant.budget_tokens is not None and spent >= tenant.budget_tokens:
            return Refusal(429, f"{name}: its budget of {tenant.budget_tokens:,} tokens is spent", tenant=name)
        for what, limit, buckets in (
            ("requests", tenant.requests_per_minute, self._requests),
            ("tokens", tenant.tokens_per_minute, self._tokens),
        ):
            if limit is None:
                buckets.pop(name, None)
                continue
            bucket = buckets.get(name)
            if bucket is None or bucket.per_minute != limit:
                bucket = buckets[name] = Bucket(limit, now)
            wait_s = bucket.wait_s(1, now)
            if wait_s > 0:
                return Refusal(429, f"{name}: over its {limit:,} {what} a minute; try again", math.ceil(wait_s), name)
        if name in self._requests:
            self._requests[name].take(1, now)
        return tenant

    def identify(self, key: str | None) -> Tenant | None:
        if key is None:
            return None
        now, known_by = self._clock(), digest(key)
        remembered = self._keys.get(known_by)
        if remembered is None or now - remembered[0] > KEY_MEMORY_S:
            remembered = now, self._accounts.tenant_of_key(key)  # without the lock: nobody waits for another's look
            with self._lock:
                if len(self._keys) >= MAX_KEYS_REMEMBERED:
                    self._keys.clear()
                self._keys[known_by] = remembered
        return remembered[1]

    def record(self, usage: Usage) -> Future[None]:
        """Its result is there once the row is on the disk."""
        with self._lock:
            if usage.tenant in self._tokens:
                self._tokens[usage.tenant].take(usage.total_tokens, self._clock())
            if usage.tenant in self._spent:
                at, spent = self._spent[usage.tenant]
                self._spent[usage.tenant] = at, spent + usage.total_tokens
        return self.writer.put(usage)

    def _spent_by(self, name: str) -> int:
        """Read again now and then: other endpoints may write to the same database."""
        now = self._clock()
        known = self._spent.get(name)
        if known is None or now - known[0] > SPENT_MEMORY_S:
            waiting = self.writer.waiting_tokens(name)
            known = self._spent[name] = now, self._accounts.spent_tokens(name) + waiting
        return known[1]
