"""Requests that are too large, or come too slowly, are refused before anything reads them whole."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from ftray.serve.openai.schemas import error_body

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class TooLarge(Exception):
    pass


class BodyLimits:
    """ASGI middleware (https://asgi.readthedocs.io)."""

    def __init__(self, app: Any, *, max_bytes: int, timeout_s: float):
        self._app = app
        self.max_bytes = max_bytes
        self.timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self.timeout_s):
                body = await self._read(scope, receive)
        except TooLarge:
            await refuse(send, 413, f"the request is larger than this endpoint takes ({self.max_bytes:,} bytes)")
        except TimeoutError:
            await refuse(send, 408, f"the request took longer than {self.timeout_s:g} s to arrive")
        else:
            await self._app(scope, replayed(body, receive), send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        reported = dict(scope["headers"]).get(b"content-length", b"0")
        if reported.isdigit() and int(reported) > self.max_bytes:
            raise TooLarge
        body = bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return bytes(body)
            body += message.get("body", b"")
            if len(body) > self.max_bytes:
                raise TooLarge
            more = message.get("more_body", False)
        return bytes(body)


def replayed(body: bytes, receive: Receive) -> Receive:
    """The body once, then what the client does next (its leaving)."""
    waiting = [body]

    async def again() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return again


async def refuse(send: Send, status: int, message: str, *, more: Mapping[str, str] | None = None, **said: Any) -> None:
    """`more`: headers; `said`: code and param."""
    body = json.dumps(error_body(message, status, **said)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.lower().encode(), value.encode()) for name, value in (more or {}).items()]
    await send({"type": "http.response.start", "status": status, "headers": [*headers, (b"connection", b"close")]})
    await send({"type": "http.response.body", "body": body})
