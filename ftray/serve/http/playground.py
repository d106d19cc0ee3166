"""What the endpoint is doing now, for the playground: aliases, what is in the replicas' memory, recent traffic. Each
tenant sees what it may use, and its own traffic; an admin everything."""

import asyncio
import contextlib
import statistics
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from ftray.errors import FtrayError
from ftray.registry.card import model_card
from ftray.registry.journal import Journal
from ftray.serve.http.context import RequestContext
from ftray.serve.http.ingress import registry_errors
from ftray.serve.routing.model_names import ModelNames
from ftray.serve.tenants.accounts import Tenant
from ftray.serve.tenants.auth import Authenticator

TRAFFIC_S = 60.0
LOOK_EVERY_S = 1.0  # however many pages are open
MAX_SHOWN = 40  # aliases (the latest moves), and adapters of a replica (the latest used)


class Replicas(Protocol):
    async def look(self) -> list[dict[str, Any]]:
        """Of each: `EngineReplica.look`."""
        ...


@dataclass(frozen=True)
class Answered:
    at: float
    tenant: str
    model: str
    completion_tokens: int
    first_token_s: float | None


class RecentTraffic:
    """A watcher of requests that have ended."""

    def __init__(self) -> None:
        self._answered: deque[Answered] = deque()

    def __call__(self, context: RequestContext) -> None:
        answer = context.answer
        if answer is not None and answer.prompt_tokens:
            now = time.monotonic()
            reported = Answered(now, context.tenant, answer.model.id, answer.completion_tokens, answer.first_token_s)
            self._answered.append(reported)
            self._forget(now)

    def by_model(self, tenant: Tenant, *, sees_all: bool) -> list[dict[str, Any]]:
        """Model, requests, completion_tokens, first_token_s (median), the busiest first."""
        self._forget(time.monotonic())
        models: dict[str, list[Answered]] = {}
        for answered in self._answered:
            if sees_all or answered.tenant == tenant.name:
                models.setdefault(answered.model, []).append(answered)
        return [summed(model, of) for model, of in sorted(models.items(), key=lambda item: -len(item[1]))]

    def _forget(self, now: float) -> None:
        while self._answered and self._answered[0].at < now - TRAFFIC_S:
            self._answered.popleft()


def summed(model: str, answers: list[Answered]) -> dict[str, Any]:
    first = [answered.first_token_s for answered in answers if answered.first_token_s is not None]
    return {
        "model": model,
        "requests": len(answers),
        "completion_tokens": sum(answered.completion_tokens for answered in answers),
        "first_token_s": statistics.median(first) if first else None,
    }


class Overview:
    def __init__(self, names: ModelNames, replicas: Replicas, auth: Authenticator, traffic: RecentTraffic):
        self._names = names
        self._replicas = replicas
        self._auth = auth
        self._traffic = traffic
        self._looking = asyncio.Lock()
        self._looked_at = float("-inf")
        self._seen: list[dict[str, Any]] = []

    async def status(self, context: RequestContext, *, names: Iterable[str]) -> dict[str, Any]:
        """`names`: models whose version now is told, besides the aliases that moved last."""
        tenant = await self._auth.tenant(context)
        registry = self._names.registry
        journal = await asyncio.to_thread(registry.refresh)
        return {
            "base_model": self._names.base_model,
            "journal": journal.last_seq,  # when it changes, so may the list of models
            "versions": await asyncio.to_thread(lambda: {name: self._version(name, tenant) for name in names}),
            "aliases": dict(aliases_of(journal, tenant)),
            "replicas": [shown(replica, tenant) for replica in await self._look()],
            "traffic": self._traffic.by_model(tenant, sees_all=self._auth.is_open or tenant.is_admin),
        }

    async def card(self, name: str, context: RequestContext) -> dict[str, str]:
        tenant = await self._auth.tenant(context)
        with registry_errors():
            return await asyncio.to_thread(self._card, name, tenant)

    def _card(self, name: str, tenant: Tenant) -> dict[str, str]:
        model = self._names.resolve(name, may_use=tenant.may_use)
        if model.adapter is None:
            return {"model": model.id, "card": f"# {model.id}\n\nThe base model, shared by all adapters.\n"}
        registry = self._names.registry
        stable = model.stable or model.adapter  # an alias's card is that of the version it stands for
        return {"model": stable, "card": model_card(registry, registry.get(stable))}

    def _version(self, name: str, tenant: Tenant) -> str | None:
        try:
            model = self._names.resolve(name, may_use=tenant.may_use)
        except FtrayError:
            return None
        return model.stable or model.id

    async def _look(self) -> list[dict[str, Any]]:
        async with self._looking:
            if time.monotonic() - self._looked_at > LOOK_EVERY_S:
                with contextlib.suppress(FtrayError):  # one died meanwhile: the next look tells
                    self._seen = await self._replicas.look()
                self._looked_at = time.monotonic()
        return self._seen


def aliases_of(journal: Journal, tenant: Tenant) -> Iterator[tuple[str, dict[str, Any]]]:
    """NAME@ALIAS with its version and canary, those that moved last first."""
    reported: set[tuple[str, str]] = set()
    num_shown = 0
    for entry in reversed(journal.entries):
        key = entry.get("name", ""), entry.get("alias", "")
        if entry["type"] not in ("alias", "canary") or key in reported or key not in journal.aliases:
            continue
        reported.add(key)
        name, alias = key
        if not tenant.may_use(name):
            continue
        num_shown += 1
        canary = journal.canaries.get(key)
        trial = {"version": f"{name}@{canary.number}", "percent": canary.percent} if canary is not None else None
        yield f"{name}@{alias}", {"version": f"{name}@{journal.aliases[key]}", "canary": trial}
        if num_shown == MAX_SHOWN:
            return


def shown(replica: dict[str, Any], tenant: Tenant) -> dict[str, Any]:
    own = [adapter for adapter in replica["adapters"] if tenant.may_use(adapter["name"])]
    return replica | {"adapters": own[:MAX_SHOWN], "num_adapters": len(own)}
