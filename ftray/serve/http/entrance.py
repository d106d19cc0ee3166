"""What is looked at before a request reaches its route and its body is read, as ASGI middlewares
(https://asgi.readthedocs.io)."""

from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from ftray.serve.http.body_limits import Message, Receive, Scope, Send, refuse
from ftray.serve.http.refusals import Refused
from ftray.serve.openai.body import ignores_unknown
from ftray.serve.tenants.auth import Authenticator

LOCAL = ("localhost", "127.0.0.1", "::1")


def header(scope: Scope, name: str) -> str | None:
    """The only one of that name, or the first."""
    found = (value for key, value in scope["headers"] if key == name.encode())
    return next((value.decode("latin-1") for value in found), None)


class Entrance:
    """Headers of a limited size; paths with and without a slash at their end; HEAD where there is GET; keys before
    bodies."""

    def __init__(self, app: Any, *, auth: Authenticator, header_bytes: int, ignore_unknown: bool):
        self._app = app
        self._auth = auth
        self._header_bytes = header_bytes
        self._ignore_unknown = ignore_unknown

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if sum(len(name) + len(value) for name, value in scope["headers"]) > self._header_bytes:
            await refuse(send, 431, f"the headers are larger than this endpoint takes ({self._header_bytes:,} bytes)")
            return
        ignores_unknown.set(self._ignore_unknown)
        if len(scope["path"]) > 1 and scope["path"].endswith("/"):
            scope = {**scope, "path": scope["path"].rstrip("/") or "/"}
        if scope["method"] == "HEAD":
            scope, send = {**scope, "method": "GET"}, without_body(send)
        elif scope["method"] == "POST":
            try:
                await self._auth.check_key(scope["state"]["context"].headers)
            except Refused as error:
                await refuse(send, error.status_code, str(error.detail), more=error.headers, code=error.code)
                return
        await self._app(scope, receive, send)


def without_body(send: Send) -> Send:
    async def head(message: Message) -> None:
        await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

    return head


class LocalOnly:
    """Of an endpoint without keys that listens for this machine alone: a page elsewhere whose name leads here (DNS
    rebinding), or whose script asks here, is not this machine's user."""

    def __init__(self, app: Any, *, hosts: Sequence[str], origins: Sequence[str]):
        self._app = app
        self._hosts = frozenset([*LOCAL, *(host.lower() for host in hosts)])
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (reason := self._foreign(header(scope, "host"), header(scope, "origin"))):
            await refuse(send, 403, reason)
            return
        await self._app(scope, receive, send)

    def _foreign(self, host: str | None, origin: str | None) -> str | None:
        if host is not None and host_name(f"//{host}") not in self._hosts:
            return f"Host: {host!r:.100} is no name of this machine's own; allowed_hosts in the config adds names"
        if origin is None or self._origins & {origin, "*"} or host_name(origin) in self._hosts:
            return None
        return f"Origin: {origin!r:.100} may not use this endpoint; cors.origins in the config adds pages"


def host_name(url: str) -> str:
    try:
        return (urlsplit(url).hostname or "").lower()
    except ValueError:
        return ""
