"""Replicas and ledger behind their Ray Serve handles: what `Ingress` and `Gate` know as `Backend` and `Ledger`."""

import asyncio
import json
import logging
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError
from ray.serve.handle import DeploymentHandle

from ftray.errors import FtrayError
from ftray.serve.http.ingress import MAX_TRIES
from ftray.serve.protocol import Event, Failed, GenerateJob, QuickAnswer, QuickJob
from ftray.serve.tenants.accounts import Tenant, Usage
from ftray.serve.tenants.rate_limits import Refusal

WARM_TIMEOUT_S = 100.0
FAILED = Failed("the replica failed; see its log", 500)
NONE_ALIVE = Failed("no replica is alive; try again", 503)
GONE = (RayActorError, ActorUnavailableError)
MAX_KEPT = 50_000  # rows of usage
LEDGER_RETRIES_S = (0.1, 0.5, 1.0, 2.0, 4.0, 8.0)

log = logging.getLogger("ftray.serve")


class ReplicaBackend:
    """The replicas behind a Ray Serve handle."""

    def __init__(self, handle: DeploymentHandle):
        self._handle = handle
        self._streaming: Any = handle.options(stream=True)

    async def stream(self, job: GenerateJob) -> AsyncGenerator[Event]:
        """A replica that dies before it said anything is replaced by another; later it has failed."""
        for _ in range(MAX_TRIES):
            response = self._streaming.generate.remote(job)
            begun = False
            try:
                async for event in response:
                    begun = True
                    yield event
                return
            except GONE as error:
                log.warning("a replica died: %s", type(error).__name__)
                if begun:
                    yield Failed("the replica that wrote this answer died; ask again", 502, replica_died=True)
                    return
            except RayTaskError as error:
                log.error("a replica failed: %s", error)
                yield FAILED
                return
            finally:
                response.cancel()  # of one that nobody reads to its end; else it does nothing
        yield NONE_ALIVE

    async def ask(self, job: QuickJob) -> QuickAnswer:
        handle: Any = self._handle
        for _ in range(MAX_TRIES):
            try:
                return await handle.answer.remote(job)
            except GONE as error:
                log.warning("a replica died: %s", type(error).__name__)
            except RayTaskError as error:
                log.error("a replica failed: %s", error)
                return FAILED
        return NONE_ALIVE

    async def warm(self, adapter: str) -> int:
        problems = await self._on_all("warm", adapter)
        for problem in filter(None, problems):
            raise FtrayError(problem)
        return len(problems)

    async def in_use(self, adapter: str) -> int:
        return sum(await self._on_all("in_use", adapter))

    async def look(self) -> list[dict[str, Any]]:
        return sorted(await self._on_all("look"), key=lambda replica: replica["id"])

    async def _on_all(self, method: str, *arguments: Any) -> list[Any]:
        """Raises `FtrayError` when one dies meanwhile."""
        try:
            return await self._handle.broadcast(method, *arguments).results_async(timeout_s=WARM_TIMEOUT_S)
        except (*GONE, TimeoutError) as error:
            raise FtrayError(f"a replica does not answer ({type(error).__name__}); try again") from None


@dataclass(frozen=True)
class Receipt:
    instance: str  # of the ledger's process
    is_written: bool  # on the disk; else in its memory


class RemoteLedger:
    """The rate limiter in its actor. One that restarts is waited for; a record may come twice, it has an id."""

    def __init__(self, handle: DeploymentHandle):
        self._handle: Any = handle
        self._unwritten: deque[Usage] = deque(maxlen=MAX_KEPT)  # given to the ledger, and in its memory alone
        self._instance: str | None = None  # of the ledger that has them

    async def admit(self, key: str | None) -> Tenant | Refusal:
        return await self._call("admit", key)

    async def identify(self, key: str | None) -> Tenant | None:
        return await self._call("identify", key)

    async def record(self, usage: Usage) -> None:
        """Also through a ledger that dies with rows in its memory: its successor gets them again, as a row has an id.
        What no ledger takes is in the log."""
        try:
            receipt = await self._call("record", [usage])
            if self._unwritten and receipt.instance != self._instance:
                lost = list(self._unwritten)
                log.warning("the ledger died with %d rows that it had not written; they are sent again", len(lost))
                receipt = await self._call("record", lost)
        except (*GONE, FtrayError) as error:
            log.error("usage that the ledger does not have: %s (%s)", json.dumps(vars(usage)), error)
            return
        if receipt.is_written:  # and so is all that came before
            self._unwritten.clear()
        else:
            self._instance = receipt.instance
            self._unwritten.append(usage)

    async def _call(self, method: str, argument: Any) -> Any:
        for wait_s in LEDGER_RETRIES_S:
            try:
                return await getattr(self._handle, method).remote(argument)
            except GONE as error:
                log.warning("the ledger does not answer (%s)", type(error).__name__)
                await asyncio.sleep(wait_s)
        try:
            return await getattr(self._handle, method).remote(argument)
        except GONE as error:
            raise FtrayError(f"the ledger does not answer ({type(error).__name__})") from None
