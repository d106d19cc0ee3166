"""What a machine has, as far as it can be seen without changing it; asked of every node of a cluster alike."""

import os
import re
import resource
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import httpx
import psutil

from ftray.cluster.leftovers import ray_directory
from ftray.storage.cache import cache_directory
from ftray.storage.machine import usable_cores
from ftray.tracking.environment import describe_environment

SHARED_MEMORY = Path("/dev/shm")
FABRICS = Path("/sys/class/infiniband")
NVIDIA_SMI = ("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits")
NVIDIA_SMI_S = 20.0
REACH_S = 3.0
IPC_LOCK = 14  # its bit (linux/capability.h)


@dataclass(frozen=True)
class Room:
    """A place that is written to."""

    place: str
    free_gib: float
    writable: bool


@dataclass(frozen=True)
class Gpu:
    name: str
    memory_gib: float
    driver: str


@dataclass(frozen=True)
class Interface:
    name: str
    address: str  # IPv4
    megabits: int | None  # a second; None where the driver does not say


@dataclass(frozen=True)
class Machine:
    host: str
    python: str
    packages: dict[str, str | None]
    clock: float  # seconds since 1970
    cpus: int
    memory_gib: float
    free_memory_gib: float
    rooms: dict[str, Room]
    shm_gib: float  # of /dev/shm
    shm_used: float  # share
    open_files: int  # soft limits
    locked_memory_gib: float
    gpus: tuple[Gpu, ...]
    gpu_problem: str | None  # what the driver's own tool says where it does not work
    cuda: str | None  # that torch was built for
    nccl: str | None
    fabrics: tuple[str, ...]  # RDMA adapters
    interfaces: tuple[Interface, ...]
    token_auth: bool  # Ray's, in this process
    wandb_problem: str | None  # why the server that was asked for does not answer
    shared: str | None  # content of the file that was asked for


def wandb_server() -> str | None:
    """Where runs that this process starts would be logged; None: offline."""
    return os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai") if "WANDB_API_KEY" in os.environ else None


def look(shared: Path | None = None, *, wandb: str | None = None) -> Machine:
    """`shared`: a file that another machine has just written. `wandb`: a server to be asked."""
    memory, shm = psutil.virtual_memory(), shutil.disk_usage(SHARED_MEMORY) if SHARED_MEMORY.is_dir() else None
    described = describe_environment()
    gpus, gpu_problem = find_gpus()
    return Machine(
        host=socket.gethostname(),
        python=described["python"],
        packages=described["packages"],
        clock=time.time(),
        cpus=usable_cores(),
        memory_gib=memory.total / 2**30,
        free_memory_gib=memory.available / 2**30,
        rooms={"cache disk": room(cache_directory()), "ray disk": room(ray_directory())},
        shm_gib=shm.total / 2**30 if shm else 0.0,
        shm_used=shm.used / shm.total if shm and shm.total else 0.0,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        locked_memory_gib=float("inf") if may_lock() else limit_gib(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]),
        gpus=gpus,
        gpu_problem=gpu_problem,
        cuda=cuda_of_torch(),
        nccl=nccl_of_torch(),
        fabrics=tuple(sorted(path.name for path in FABRICS.glob("*"))),
        interfaces=find_interfaces(),
        token_auth=asks_for_token(),
        wandb_problem=why_unreached(wandb) if wandb is not None else None,
        shared=shared.read_text() if shared is not None and shared.is_file() else None,
    )


def room(place: Path) -> Room:
    existing = next(p for p in [place, *place.parents] if p.exists())
    return Room(str(existing), shutil.disk_usage(existing).free / 2**30, os.access(existing, os.W_OK))


def why_unreached(url: str) -> str | None:
    try:
        httpx.get(url, timeout=REACH_S)
    except httpx.HTTPError as error:
        return type(error).__name__
    return None


def limit_gib(limit: int) -> float:
    return float("inf") if limit == resource.RLIM_INFINITY else limit / 2**30


def may_lock() -> bool:
    """Whether the limit counts for this process: not with the capability IPC_LOCK."""
    capabilities = re.search(r"^CapEff:\s*([0-9a-f]+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    return capabilities is not None and bool(int(capabilities[1], 16) >> IPC_LOCK & 1)


def find_gpus() -> tuple[tuple[Gpu, ...], str | None]:
    """By the driver's own tool, and what is wrong with it: what torch sees depends on what Ray gave this process."""
    if shutil.which(NVIDIA_SMI[0]) is None:
        return (), None
    try:
        done = subprocess.run(NVIDIA_SMI, capture_output=True, text=True, timeout=NVIDIA_SMI_S, check=False)
    except subprocess.TimeoutExpired:
        return (), f"nvidia-smi does not answer within {NVIDIA_SMI_S:.0f} s: a GPU hangs"
    reported = (done.stdout + done.stderr).strip().splitlines() or [f"nvidia-smi ended with code {done.returncode}"]
    return (parse_gpus(done.stdout), None) if done.returncode == 0 else ((), reported[0])


def parse_gpus(listed: str) -> tuple[Gpu, ...]:
    """Lines of `name, MiB, driver`. Memory that is not told (`[N/A]`, where CPU and GPU share it) is 0."""
    rows = [[part.strip() for part in line.rsplit(",", 2)] for line in listed.splitlines() if line.count(",") >= 2]
    return tuple(Gpu(name, float(mib) / 1024 if mib.isdigit() else 0.0, driver) for name, mib, driver in rows)


def cuda_of_torch() -> str | None:
    try:
        import torch
    except ImportError:
        return None
    return torch.version.cuda


def nccl_of_torch() -> str | None:
    for package in ("nvidia-nccl-cu13", "nvidia-nccl-cu12"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return None


def find_interfaces() -> tuple[Interface, ...]:
    """Those that are up, with an IPv4 address, but the loopback."""
    stats = psutil.net_if_stats()
    return tuple(
        Interface(name, address.address, stats[name].speed or None)
        for name, addresses in sorted(psutil.net_if_addrs().items())
        for address in addresses
        if address.family == socket.AF_INET and name in stats and stats[name].isup and name != "lo"
    )


def asks_for_token() -> bool:
    """Whether Ray in this process asks for a token and shows one."""
    try:
        from ray._private.authentication.authentication_utils import is_token_auth_enabled
    except ImportError:  # another version of Ray, or none
        return os.environ.get("RAY_AUTH_MODE", "").lower() == "token"
    return bool(is_token_auth_enabled())
