"""Ray from a driver's side: the cluster that it joins, or a session of its own."""

import contextlib
import logging
import os
import re
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from typing import Any

import ray
from ray._private import ray_constants, worker as ray_worker  # no public ones
from ray.job_config import JobConfig
from ray.util import get_node_ip_address

from ftray.cluster import reaper
from ftray.cluster.address import ADDRESS, no_cluster
from ftray.cluster.temporary import settle_temporary_directory
from ftray.config import RunConfig
from ftray.errors import InterruptedRunError, UserError
from ftray.storage.machine import keep_loopback_from_proxies, usable_cores

PORT = "RAY_GCS_SERVER_PORT"
_reapers: list[tuple[Any, int]] = []  # with pipes that are open as long as this process lives
TIMED_OUT = "timed out during startup"


def start_ray(*, join: bool = True, run: str | None = None) -> bool:
    """Joins the cluster of RAY_ADDRESS (True; `ray job submit` sets it), else starts a session of our own (False).

    `run`: its name, as Ray's dashboard and `ray list jobs` show it among the driver's metadata.
    A session that another program runs on this machine is left alone: it would end under us when that program does.
    """
    keep_loopback_from_proxies()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")  # a worker without GPUs sees none
    address = os.environ.get(ADDRESS) if join else None
    ray_worker.print_to_stdstream = print_message_of_ray
    described = JobConfig(metadata={"job_name": run} if run is not None else None)
    how: dict[str, Any] = {"job_config": described, "logging_level": logging.ERROR, "log_to_driver": False}
    try:
        if address:
            ray.init(address=address, **how)
        else:
            start_session(how)
    except ConnectionError as error:
        raise no_cluster(address, error) from None
    return address is not None


def start_session(how: dict[str, Any]) -> None:
    """One of our own. Ray gives its processes 30 s; on a busy machine that may be too short, and what it has read once
    is in memory the second time. Raises `UserError`."""
    settle_temporary_directory()
    for is_last in (False, True):
        try:
            with on_loopback(), own_address(), ended_with_this_process() as to_reaper:
                ray.init(address="local", **how)
            os.write(to_reaper, os.fsencode(session_directory()))
            return
        except Exception as error:
            if TIMED_OUT not in str(error):
                raise
            ray.shutdown()
            if is_last:
                load, cores = os.getloadavg()[0], usable_cores()
                raise UserError(
                    f"Ray did not start within 30 s, twice: this machine is busy (load {load:.0f} on {cores} cores); "
                    "try again when other work has ended, or start a cluster beforehand (`ray start --head`) and set "
                    "RAY_ADDRESS"
                ) from None


def print_message_of_ray(data: dict[str, Any], ignore_prefix: bool = False) -> None:
    """Of what Ray publishes to a driver (a worker that died, a node without memory) the first sentence, in place of a
    paragraph between the lines of a table. Ray's logs have the rest."""
    for text in data["lines"]:
        first, *_ = re.split(r"(?<=[.!?])\s", " ".join(text.split()), maxsplit=1)
        print(f"Ray: {first}", file=sys.stderr, flush=True)


def session_directory() -> str:
    from ray._private.worker import _global_node  # no public one

    return _global_node.get_session_dir_path() if _global_node is not None else ""


def logs_directory() -> str:
    """Of the session that this process is in, on this machine."""
    from ray._private.worker import _global_node  # no public one

    return _global_node.get_logs_dir_path() if _global_node is not None else "Ray's session directory"


@contextlib.contextmanager
def ended_with_this_process() -> Iterator[int]:
    """A session that starts in it is ended with this process, however that ends (`reaper.py`). Yields the pipe that the
    session's directory goes to."""
    mark = f"{reaper.MARK}={uuid.uuid4().hex}"
    command = [sys.executable, "-I", reaper.__file__, mark]
    reading, writing = os.pipe()  # it ends when this process does, and nobody else has the writing end
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, stdin=reading, start_new_session=True, **quiet)
    os.close(reading)
    _reapers.append((process, writing))
    name, _, value = mark.partition("=")
    os.environ[name] = value
    try:
        yield writing
    finally:
        del os.environ[name]


@contextlib.contextmanager
def on_loopback() -> Iterator[None]:
    """All processes of a session that starts in it (its control service, agents, workers, pages of metrics) listen on
    127.0.0.1. By Ray's own switch, which is on where a machine is never part of a cluster (macOS, Windows)."""
    before = os.environ.get(ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR), ray_constants.ENABLE_RAY_CLUSTER
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False  # read from the environment when ray is imported
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before[1]
        restore(ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, before[0])


def restore(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


@contextlib.contextmanager
def own_address() -> Iterator[None]:
    """A session that starts in it has its own address in the environment of all its processes.

    Without it, those that ask for Ray's state ask the cluster that `ray start` began last on this machine, alive or
    not. Ray Train's PlacementGroupCleaner is one: it would hold up the end of every run for 12 s.
    """
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    before = {name: os.environ.get(name) for name in (ADDRESS, PORT)}
    os.environ.update({ADDRESS: f"{get_node_ip_address()}:{port}", PORT: str(port)})
    try:
        yield
    finally:
        for name, value in before.items():
            restore(name, value)


@contextlib.contextmanager
def ray_session(run: RunConfig) -> Iterator[None]:
    """The caller's, or one of our own that ends here."""
    own = not ray.is_initialized()
    if own:
        start_ray(run=run.name)
    try:
        yield
    except InterruptedRunError:
        raise  # a thread still waits for Ray, which would end the process before its message is printed
    except BaseException:
        if own:
            ray.shutdown()
        raise
    if own:
        ray.shutdown()
