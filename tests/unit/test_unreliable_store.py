"""A store that refuses some requests and drops others: what is large goes up in parts, each tried again."""

import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import obstore
import pytest
from obstore.exceptions import BaseError
from obstore.store import from_url
from s3 import s3_server

from ftray.storage import ObjectStore

LARGE = os.urandom(12 << 20)  # obstore's parts have 5 MiB


class Proxy(ThreadingHTTPServer):
    """Passes every other request on to `behind`; refuses one of the rest (503), drops the next."""

    daemon_threads = True

    def __init__(self, behind: str):
        super().__init__(("127.0.0.1", 0), Handler)
        self.behind = behind
        self.lock = threading.Lock()
        self.seen: list[str] = []
        self.refused = self.dropped = 0

    def fate(self, line: str) -> str:
        with self.lock:
            self.seen.append(line)
            if len(self.seen) % 2 == 0:
                return "pass"
            if self.refused <= self.dropped:
                self.refused += 1
                return "refuse"
            self.dropped += 1
            return "drop"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fate = self.server.fate(f"{self.command} {self.path}")
        if fate == "drop":
            self.close_connection = True
            return
        headers: dict[str, str] = {}
        status, content, reported = 503, b"", None
        if fate == "pass":
            reported = httpx.request(
                self.command, f"{self.server.behind}{self.path}", headers=dict(self.headers.items()), content=body
            )
            status, content = reported.status_code, reported.content
            passed = ("etag", "content-type", "last-modified", "content-range")
            headers = {name: value for name, value in reported.headers.items() if name in passed}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        length = reported.headers["content-length"] if reported is not None and self.command == "HEAD" else len(content)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def proxy(monkeypatch) -> Iterator[Proxy]:
    with s3_server("bucket"), Proxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_port}")
        yield proxy
        proxy.shutdown()


def test_a_large_file_arrives_whole(proxy, tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(LARGE)
    store = ObjectStore("s3://bucket/run")
    store.write("weights", path)
    assert sum("partNumber=" in line for line in proxy.seen) >= 3, "in parts"
    found = store.find("weights")
    assert found is not None
    store.download(found, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == LARGE
    assert min(proxy.refused, proxy.dropped) >= 3


def test_who_does_not_try_again_fails(proxy):
    """The twin."""
    with pytest.raises((BaseError, OSError)):
        obstore.put(from_url("s3://bucket/run", retry_config={"max_retries": 0}), "other", LARGE)
    assert ObjectStore("s3://bucket/run").find("other") is None, "no part of it is taken for it"
