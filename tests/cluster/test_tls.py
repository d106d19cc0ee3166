"""cluster/tls/certificates.sh: Ray with its certificates, and who does not get in."""

import re
import socket
import ssl
import subprocess
import sys
from pathlib import Path

import pytest
from heads import TOKEN, free_port, head_node, plain_environment

from ftray.doctor.machine import find_interfaces

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "cluster/tls/certificates.sh"
ADDRESSES = [interface.address for interface in find_interfaces()]  # Ray's head takes one of them
DRIVER = """
import logging, sys, ray
ray.init(address=sys.argv[1], logging_level=logging.ERROR, log_to_driver=False)
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
    certificates("node", directory, "head", *ADDRESSES, "head.example")
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


def talks(port: int, *, authority: Path, certificate: Path | None) -> bool:
    """Whether Ray's port says a word of HTTP/2 to who shows this certificate."""
    context = ssl.create_default_context(cafile=str(authority / "ca.crt"))
    context.set_alpn_protocols(["h2"])
    if certificate is not None:
        context.load_cert_chain(certificate / "head.crt", certificate / "head.key")
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=20) as plain:
            with context.wrap_socket(plain, server_hostname="127.0.0.1") as connection:
                connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
                return len(connection.recv(9)) > 0
    except (ssl.SSLError, ConnectionResetError):
        return False


def test_only_who_has_a_certificate_of_the_authority_gets_in(authority, tmp_path):
    other = tmp_path / "other"
    certificates("authority", other)
    certificates("node", other, "head", *ADDRESSES)
    port, ours = free_port(), environment_of(authority, "head")
    with head_node(port=port, **ours):
        command = [sys.executable, "-c", DRIVER, f"127.0.0.1:{port}"]
        environment = plain_environment(**TOKEN, **ours)
        inside = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=90, check=False)
        assert inside.stdout == "sum 14\n", inside.stderr[-2000:]
        assert talks(port, authority=authority, certificate=authority)
        assert not talks(port, authority=authority, certificate=None)
        assert not talks(port, authority=authority, certificate=other)
        assert not talks(port, authority=other, certificate=authority), "a head that is not ours is not believed"
        with socket.create_connection(("127.0.0.1", port), timeout=20) as plain:
            plain.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
            assert b"HTTP" not in plain.recv(64), "without TLS"
