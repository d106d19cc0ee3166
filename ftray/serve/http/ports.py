"""Where an endpoint listens: whether it can, before anything is started."""

import errno
import json
import os
import socket
import urllib.request

from ftray.errors import UserError


def check_port(host: str, port: int, *, in_session: bool = False) -> None:
    """Where Ray Serve listens already, in the cluster that is joined or (`in_session`) in the caller's own session, an
    endpoint is deployed anew."""
    if (in_session or "RAY_ADDRESS" in os.environ) and is_ray_serve(host, port):
        return
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host.strip("[]"), port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise UserError(f"port: {port} on {host} is in use; choose another with port=NUMBER") from None
            raise UserError(f"host: {in_url(host)}:{port} cannot be listened on: {error.strerror}") from None


def is_ray_serve(host: str, port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://{reachable(host)}:{port}/-/routes", timeout=5) as answer:
            return isinstance(json.load(answer), dict)
    except (OSError, ValueError):
        return False


def reachable(host: str) -> str:
    """For a URL: an endpoint that listens on all addresses is asked on this machine's own."""
    return in_url({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host))


def in_url(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host
