"""Slurm's own daemons on hosts that are network namespaces: a controller on the first, slurmds on the others."""

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from hosts import Cluster, Host

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
CONFIG = """
ClusterName=ft
SlurmctldHost={hostname}({controller})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SlurmdTimeout=20
ReturnToService=2
MpiDefault=none
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def has_slurm() -> bool:
    path = f"{os.environ['PATH']}:/usr/sbin"
    return all(shutil.which(program, path=path) for program in PROGRAMS)


@dataclass
class Slurm:
    cluster: Cluster
    directory: Path
    daemons: list[subprocess.Popen] = field(default_factory=list)

    @property
    def workers(self) -> dict[str, Host]:
        return {f"n{number}": host for number, host in enumerate(self.cluster.hosts[1:], 1)}

    def start(self) -> None:
        (self.directory / "state").mkdir(parents=True)
        key = self.directory / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        nodes = [
            f"NodeName={name} NodeAddr={host.address} CPUs=1 RealMemory=8000" for name, host in self.workers.items()
        ]
        (self.directory / "slurm.conf").write_text(
            CONFIG.format(
                hostname=socket.gethostname().split(".")[0],
                controller=self.cluster.head.address,
                directory=self.directory,
                nodes="\n".join(nodes),
            )
        )
        files = [
            f"--{name}={self.directory}/munge.{name.split('-')[0]}" for name in ("log-file", "pid-file", "seed-file")
        ]
        socket_file = f"--socket={self.directory}/munge.socket"
        self._daemon("munged", "--force", "--foreground", f"--key-file={key}", socket_file, *files)
        # slurmd looks which kind of cgroups there are, also where nothing uses them, and finds none in a container.
        (self.directory / "cgroup.conf").write_text(
            f"CgroupPlugin=cgroup/v1\nCgroupMountpoint={self.directory}/cgroup\nCgroupAutomount=no\n"
        )
        self._daemon("slurmctld", "-D", on=self.cluster.head)
        for name, host in self.workers.items():
            self._daemon("slurmd", "-D", "-N", name, on=host)
        self.wait_for(
            lambda: self.call("sinfo", "-h", "-o", "%t %D").strip() == f"idle {len(self.workers)}", "the nodes"
        )

    def _daemon(self, program: str, *options: str, on: Host | None = None) -> None:
        command = [shutil.which(program, path="/usr/sbin:/usr/bin") or program, *options]
        log = (self.directory / f"{program}.out").open("ab")
        self.daemons.append(
            subprocess.Popen(
                command if on is None else self.cluster.on(on, *command),
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment(),
                start_new_session=True,
            )
        )

    def environment(self) -> dict[str, str]:
        return self.cluster.environment() | {"SLURM_CONF": str(self.directory / "slurm.conf")}

    def call(self, *command: str, cwd: Path | None = None, **more: str) -> str:
        """As a user on the login machine, which is the first host. Its environment goes with a job; it has no token."""
        environment = {key: value for key, value in self.environment().items() if not key.startswith("RAY_AUTH")}
        done = subprocess.run(
            self.cluster.on(self.cluster.head, *command),
            capture_output=True,
            text=True,
            env=environment | more,
            cwd=cwd,
            timeout=60,
            check=False,
        )
        return done.stdout + done.stderr

    def submit(self, *words: str, cwd: Path, **more: str) -> int:
        out = self.call("sbatch", *words, cwd=cwd, **more)
        found = re.search(r"Submitted batch job (\d+)", out)
        assert found is not None, out
        return int(found[1])

    def job(self, number: int) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\S+)", self.call("scontrol", "show", "job", str(number))))

    def wait_for(self, condition, what: str, *, timeout_s: float = 150):
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            if found := condition():
                return found
            time.sleep(0.5)
        logs = "".join(
            f"{path.name}: {path.read_text()[-1500:]}\n" for path in sorted(self.directory.glob("*.[lo][ou][gt]"))
        )
        raise AssertionError(f"waited {timeout_s:.0f} s for {what}\n{logs}")

    def stop(self) -> None:
        for daemon in reversed(self.daemons):
            os.killpg(daemon.pid, signal.SIGTERM)
        for daemon in self.daemons:
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                os.killpg(daemon.pid, signal.SIGKILL)
