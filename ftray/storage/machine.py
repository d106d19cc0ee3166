"""What this process may use of its machine, and who it works for."""

import getpass
import os
from pathlib import Path

LOOPBACK = ("localhost", "127.0.0.1", "::1")
PROXIES = ("http_proxy", "https_proxy", "all_proxy")
CGROUP_V2 = Path("/sys/fs/cgroup/cpu.max")
CGROUP_V1 = Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"), Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us")


def user_name() -> str:
    """The name, or in a container that has none for its user the number."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # Python 3.13 raises the latter
        return f"uid-{os.getuid()}"


def proxies() -> dict[str, str]:
    """Those that this environment names, for clients of HTTP."""
    return {name: value for name, value in os.environ.items() if name.lower() in PROXIES and value}


def keep_loopback_from_proxies() -> None:
    """What this machine asks itself goes through no proxy, in this process and those that it starts: it would not
    arrive, and a proxy would read it."""
    if not proxies():
        return
    for name in ("no_proxy", "NO_PROXY"):
        named = [host.strip() for host in os.environ.get(name, "").split(",") if host.strip()]
        if "*" not in named:
            os.environ[name] = ",".join([*named, *(host for host in LOOPBACK if host not in named)])


def usable_cores() -> int:
    """Those that this process may run on (`taskset`, a container's quota), not those that the machine has."""
    allowed = len(os.sched_getaffinity(0))
    quota = cgroup_cores()
    return allowed if quota is None else max(1, min(allowed, quota))


def cgroup_cores() -> int | None:
    """A container's quota in whole cores, where there is one."""
    try:
        quota, period = CGROUP_V2.read_text().split()
    except (OSError, ValueError):
        try:
            quota, period = (path.read_text().strip() for path in CGROUP_V1)
        except OSError:
            return None
    if not quota.isdigit() or not period.isdigit() or int(period) == 0:  # "max", or -1
        return None
    return int(quota) // int(period)
