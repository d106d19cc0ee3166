"""What this process may use of its machine, and who it works for."""

import getpass
import os
from pathlib import Path

CGROUP_V2 = Path("/sys/fs/cgroup/cpu.max")
CGROUP_V1 = Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"), Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us")


def user_name() -> str:
    """The name, or in a container that has none for its user the number."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # Python 3.13 raises the latter
        return f"uid-{os.getuid()}"


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
