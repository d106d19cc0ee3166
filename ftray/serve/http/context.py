"""One HTTP request and what became of it, told to the watchers (metrics, access log, traces) when it has ended,
however it ended: answered, refused, or left by its client."""

import asyncio
import contextvars
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from ftray.serve.http.answer import Answer
from ftray.serve.http.body_limits import Message, Receive, Scope, Send, refuse
from ftray.serve.tenants.auth import Headers

CLIENT_LEFT = 499  # nginx's status for it

log = logging.getLogger("ftray.serve")


@dataclass
class RequestContext:
    method: str
    path: str
    headers: Headers
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    at: float = field(default_factory=time.time)
    began: float = field(default_factory=time.perf_counter)
    seconds: float = 0.0
    status: int = CLIENT_LEFT
    tenant: str = ""  # once it is known
    asked_model: str | None = None
    answer: Answer | None = None
    is_stream: bool = False
    on_end: Callable[[], Awaitable[None]] | None = None  # also when the client has gone

    @property
    def model(self) -> str | None:
        """What answered. A name that was only asked for is not one: anybody may ask for anything."""
        return self.answer.model.id if self.answer is not None else None


Watcher = Callable[[RequestContext], None]


def given_id(headers: Headers) -> str:
    """A caller's id for its request, or that of a proxy before us, as far as it can stand in a log."""
    return re.sub(r"[^A-Za-z0-9._:-]", "", headers.get("x-request-id") or "")[:48]


_detached: set["asyncio.Task[None]"] = set()  # an event loop alone would forget them


def detached(work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
    """A task outside the request: when a client leaves, Ray Serve cancels what its request, known by the context, has
    asked of others, the ledger among them."""
    task = asyncio.create_task(work, context=contextvars.Context())
    _detached.add(task)
    task.add_done_callback(_detached.discard)
    return task


class Watched:
    """ASGI middleware (https://asgi.readthedocs.io): makes the context, as `request.state.context`."""

    def __init__(self, app: Any, *, watchers: Sequence[Watcher]):
        self._app = app
        self._watchers = watchers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        if sum(name == b"authorization" for name, _ in scope["headers"]) > 1:
            del headers["authorization"]  # a proxy before us may have looked at the other one
        context = RequestContext(scope["method"], scope["path"], headers)
        context.request_id = given_id(headers) or context.request_id
        scope.setdefault("state", {})["context"] = context

        begun = False

        async def note(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                context.status = message["status"]
                # Else Ray Serve's proxy, which gave it or passed it on, answers with it.
                if "x-request-id" not in headers:
                    own = (b"x-request-id", context.request_id.encode())
                    message["headers"] = [*message.get("headers", []), own]
            await send(message)

        try:
            await self._app(scope, receive, note)
        except Exception:
            if begun:
                raise
            log.exception("request %s failed", context.request_id)
            await refuse(note, 500, f"the endpoint failed; its log has request {context.request_id}")
        finally:
            # A task of its own: where the client has left, this one is being cancelled, at every await anew.
            await asyncio.shield(detached(self._end(context)))

    async def _end(self, context: RequestContext) -> None:
        context.seconds = time.perf_counter() - context.began
        try:
            if context.on_end is not None:
                await context.on_end()
        finally:
            for watch in self._watchers:
                try:
                    watch(context)
                except Exception:  # a full disk under the log, say: no reason to refuse an answer
                    log.exception("a watcher failed")
