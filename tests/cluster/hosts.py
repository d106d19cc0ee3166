"""A real cluster on one machine: every host is a network namespace with an address, a link that can be cut, and a Ray
node of its own. Needs root and `ip`.

    head (no CPUs for workers) -- bridge -- host 1, host 2, ... (one CPU each, so workers must spread)

What is started is ended by its process group; the namespaces and links go by name.
"""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

BIN = Path(sys.executable).parent
PORT = 6379


def can_make_hosts() -> bool:
    """Tries: root in a container may have neither the right to make namespaces nor to mount."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"ft{secrets.token_hex(2)}try"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False)
    if made.returncode != 0:
        return False
    inside = ["ip", "netns", "exec", name, "unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    mounts = subprocess.run(inside, capture_output=True, check=False)
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return mounts.returncode == 0


@contextlib.contextmanager
def running_cluster(*, num_workers: int) -> "Iterator[Cluster]":
    directory = Path(tempfile.mkdtemp(prefix="ft"))
    cluster = Cluster(directory)
    try:
        cluster.start(num_workers=num_workers)
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(directory, ignore_errors=True)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@dataclass
class Host:
    name: str  # of its namespace
    address: str
    link: str  # its end of the cable on the bridge
    process: subprocess.Popen | None = None


@dataclass
class Cluster:
    directory: Path  # Ray's temporary files; short, since socket paths are limited
    tag: str = field(default_factory=lambda: secrets.token_hex(2))
    token: str = field(default_factory=lambda: secrets.token_hex(32))
    hosts: list[Host] = field(default_factory=list)

    @property
    def small_disk(self) -> Path:
        """60 MB that all hosts share."""
        return self.directory / "disk"

    @property
    def head(self) -> Host:
        return self.hosts[0]

    def start(self, *, num_workers: int) -> None:
        self.make_hosts(num_workers + 1)
        for host in self.hosts:
            self.start_node(host)
        self.wait_for_nodes(num_workers + 1)

    def make_hosts(self, count: int) -> None:
        """With nothing on them yet."""
        Path("/tmp/ray").mkdir(exist_ok=True)
        self.small_disk.mkdir()
        # Before the hosts: each has a mount table of its own.
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", str(self.small_disk)], check=True)
        bridge = f"ft{self.tag}"
        ip("link", "add", bridge, "type", "bridge")
        ip("link", "set", bridge, "up")
        for number in range(count):
            host = Host(f"ft{self.tag}n{number}", f"10.77.0.{number + 1}", f"ft{self.tag}v{number}")
            self.hosts.append(host)
            ip("netns", "add", host.name)
            ip("link", "add", host.link, "type", "veth", "peer", "name", "eth0", "netns", host.name)
            ip("link", "set", host.link, "master", bridge, "up")
            for command in (
                ("addr", "add", f"{host.address}/24", "dev", "eth0"),
                ("link", "set", "eth0", "up"),
                ("link", "set", "lo", "up"),
            ):
                ip("-n", host.name, *command)

    def start_node(self, host: Host) -> None:
        where = ["--head", f"--port={PORT}"] if host is self.head else [f"--address={self.head.address}:{PORT}"]
        command = [str(BIN / "ray"), "start", "--block", f"--node-ip-address={host.address}", *where]
        command += [f"--num-cpus={0 if host is self.head else 1}", "--disable-usage-stats"]
        command.append("--object-store-memory=100000000")
        log = (self.directory / f"{host.name}.log").open("ab")
        host.process = subprocess.Popen(
            self.on(host, *command),
            stdout=log,
            stderr=subprocess.STDOUT,
            env=self.environment() | self.cache_of(host),
            start_new_session=True,
            cwd="/",
        )

    def cache_of(self, host: Host) -> dict[str, str]:
        """The hosts share this machine's disks; the workers' have caches of their own."""
        return {} if host is self.head else {"XDG_CACHE_HOME": str(self.directory / host.name / "cache")}

    def environment(self) -> dict[str, str]:
        plain = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        return plain | {
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",  # a job's entrypoint says `python`
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "GLOO_SOCKET_IFNAME": "eth0",
            "RAY_health_check_initial_delay_ms": "2000",
            "RAY_health_check_period_ms": "1000",
        }

    def run(self, *command: str, **options) -> subprocess.Popen:
        """A program on the head host, told where the cluster is."""
        environment = self.environment() | {"RAY_ADDRESS": f"{self.head.address}:{PORT}", "HF_HUB_OFFLINE": "1"}
        return subprocess.Popen(self.on(self.head, *command), env=environment, start_new_session=True, **options)

    def on(self, host: Host, *command: str) -> list[str]:
        """In the host's network, and with a /tmp/ray of its own: two nodes of one directory get in each other's way."""
        own = self.directory / host.name
        own.mkdir(exist_ok=True)
        shell = 'mount --bind "$0" /tmp/ray && exec "$@"'
        return [
            "ip",
            "netns",
            "exec",
            host.name,
            "unshare",
            "--mount",
            "--propagation=slave",
            "sh",
            "-c",
            shell,
            str(own),
            *command,
        ]

    def wait_for_nodes(self, count: int, *, timeout_s: float = 90) -> None:
        code = (
            "import ray, sys, logging; ray.init(address=sys.argv[1], logging_level=logging.ERROR, log_to_driver=False);"
            "print(sum(n['Alive'] for n in ray.nodes()))"
        )
        end = time.monotonic() + timeout_s
        found = "none"
        while time.monotonic() < end:
            process = self.run(sys.executable, "-c", code, f"{self.head.address}:{PORT}", stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
            try:
                out, found = process.communicate(timeout=30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                continue
            if process.returncode == 0 and int(out.strip().splitlines()[-1]) >= count:
                return
            time.sleep(1)
        logs = "".join(path.read_text()[-800:] for path in sorted(self.directory.glob("*.log")))
        raise AssertionError(f"the cluster has no {count} nodes after {timeout_s:.0f} s: {found}\n{logs}")

    def processes_on(self, host: Host) -> list[int]:
        done = subprocess.run(["ip", "netns", "pids", host.name], capture_output=True, text=True, check=True)
        return [int(word) for word in done.stdout.split()]

    def kill_worker(self, host: Host) -> None:
        """The training process of this host, with SIGKILL."""
        for pid in self.processes_on(host):
            try:
                title = Path(f"/proc/{pid}/cmdline").read_bytes()
            except OSError:
                continue
            if b"RayTrainWorker" in title:
                os.kill(pid, signal.SIGKILL)
                return
        raise AssertionError(f"no training worker on {host.name}")

    def stop_node(self, host: Host) -> None:
        """As if the host lost its power: everything in its namespace ends at once."""
        for pid in self.processes_on(host):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if host.process is not None:
            host.process.wait(timeout=30)

    def cut(self, host: Host) -> None:
        ip("link", "set", host.link, "down")

    def fix(self, host: Host) -> None:
        ip("link", "set", host.link, "up")

    def stop(self) -> None:
        for host in reversed(self.hosts):
            self.stop_node(host)
            ip("netns", "del", host.name)
        ip("link", "del", f"ft{self.tag}")
        subprocess.run(["umount", "-l", str(self.small_disk)], check=True)
