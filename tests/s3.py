"""A real S3 wire server for tests, in this process."""

import contextlib
from collections.abc import Iterator

import httpx
import pytest


@contextlib.contextmanager
def s3_server(bucket: str) -> Iterator[str]:
    """Yields the bucket's URL; meanwhile this process's environment leads there."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ALLOW_HTTP", "true")
        patch.setenv("AWS_REGION", "us-east-1")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        httpx.put(f"http://{host}:{port}/{bucket}")
        yield f"s3://{bucket}"
    server.stop()
