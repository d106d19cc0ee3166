"""cluster/tls/certificates.sh: Ray with its certificates, and who does not get in."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from heads import TOKEN, free_port, head_node, plain_environment

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "cluster/tls/certificates.sh"
DRIVER = """
import logging, sys, ray
ray.init(address=sys.argv[1], logging_level=logging.ERROR, log_to_driver=False, _node_ip_address="127.0.0.1")
print("sum", sum(ray.get([ray.remote(lambda i: i * i).remote(i) for i in range(4)])))
"""


def certificates(*words: str | Path) -> str:
    done = subprocess.run([SCRIPT, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def environment_of(directory: Path, name: str) -> dict[str, str]:
    return dict(re.findall(r"^export (\w+)=(.*)$", certificates("environment", directory, name), re.MULTILINE))


@pytest.fixture(scope="module")
def authority(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("tls")
    certificates("authority", directory)
    certificates("node", directory, "head", "127.0.0.1", "head.example")
    return directory


def test_a_mistake_makes_nothing(authority, tmp_path):
    for words, says in (
        (("authority", authority), "would lock out every node"),
        (("node", authority, "../up", "10.0.0.1"), "NAME"),
        (("node", authority, "worker", "10.0.0.1; rm"), "neither an address nor a host's name"),
        (("node", tmp_path, "worker", "10.0.0.1"), "ca.key is missing"),
        (("environment", authority, "worker"), "worker.key is missing"),
        ((), "usage:"),
    ):
        done = subprocess.run([SCRIPT, *words], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert says in done.stderr
    assert {path.name for path in authority.iterdir()} <= {"ca.crt", "ca.key", "ca.srl", "head.crt", "head.key"}
    assert all(path.stat().st_mode & 0o077 == 0 for path in authority.glob("*.key"))


def test_only_who_has_a_certificate_of_the_authority_gets_in(authority, tmp_path):
    other = tmp_path / "other"
    certificates("authority", other)
    certificates("node", other, "head", "127.0.0.1")
    port = free_port()

    def drive(**environment: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", DRIVER, f"127.0.0.1:{port}"]
        everything = plain_environment(**TOKEN, RAY_gcs_rpc_server_connect_timeout_s="5") | environment
        try:
            return subprocess.run(command, capture_output=True, text=True, env=everything, timeout=60, check=False)
        except subprocess.TimeoutExpired as waited:  # it waits for an answer that never comes
            return subprocess.CompletedProcess(command, 124, stdout=str(waited.stdout or ""), stderr="")

    ours = environment_of(authority, "head")
    with head_node(port=port, **ours):
        inside = drive(**ours)
        assert inside.stdout == "sum 14\n", inside.stderr[-2000:]
        for closed in (drive(), drive(**environment_of(other, "head"))):
            assert closed.returncode != 0
            assert "sum" not in closed.stdout
