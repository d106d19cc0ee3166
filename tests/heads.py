"""A head node of its own, closed by a token, for tests that submit jobs to it."""

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

RAY = str(Path(sys.executable).with_name("ray"))
# A closed cluster: without the token its job server answers 401.
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


def plain_environment(**more: str) -> dict[str, str]:
    """With this environment's programs first, as on a node: a job's entrypoint says `python`."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | {"PATH": path} | more


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(condition, what: str, *, timeout_s: float = 120):
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.3)
    raise AssertionError(f"waited {timeout_s:.0f} s for {what}")


def answers(url: str, status: int = 200) -> bool:
    try:
        return httpx.get(url, timeout=2).status_code == status
    except httpx.HTTPError:
        return False


def last_step(run: Path) -> int:
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").is_file() else []
    return json.loads(lines[-1])["step"] if lines else 0


@contextlib.contextmanager
def head_node(*, port: int | None = None, **more: str) -> Iterator[str]:
    """Ended by its id; yields the address of its job server. `port`: of Ray itself; `more`: its environment."""
    ports = {name: free_port() for name in ("dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port")}
    command = [RAY, "start", "--head", "--block", "--num-cpus=4", "--disable-usage-stats"]
    command += [f"--{name}={number}" for name, number in ports.items()]
    command.append(f"--port={port or free_port()}")
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd="/",
        env=plain_environment(**TOKEN, **more),
    )
    url = f"http://127.0.0.1:{ports['dashboard-port']}"
    try:
        wait_for(lambda: answers(f"{url}/api/version", status=401), "the head node")
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
