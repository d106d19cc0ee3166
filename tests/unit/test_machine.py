"""Machines as they are: addresses, temporary directories, cores, users."""

import os
import socket

import pytest

from ftray.cluster.address import check_address
from ftray.cluster.temporary import SOCKET, SOCKET_BYTES, settle_temporary_directory
from ftray.errors import UserError
from ftray.storage import machine


@pytest.fixture
def environment(monkeypatch, tmp_path):
    for name in ("RAY_ADDRESS", "RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return monkeypatch


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://127.0.0.1:8265", "is the address of a dashboard, for `ftray submit --address`"),
        ("ray://127.0.0.1:10001", "is one for Ray Client"),
        ("nohost:abc", "is none: give the head's HOST:PORT"),
        ("127.0.0.1", "is none: give the head's HOST:PORT"),
        ("127.0.0.1:99999", "no Ray cluster answers there"),
    ],
)
def test_an_address_is_looked_at_first(environment, address, message):
    environment.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match=f"RAY_ADDRESS: {address}:? ?{message}"):
        check_address()


def test_an_address_at_which_somebody_listens(environment):
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        environment.setenv("RAY_ADDRESS", f"127.0.0.1:{listening.getsockname()[1]}")
        with pytest.raises(UserError, match="no Ray cluster answers there"):
            check_address()
        listening.listen()
        check_address()
    environment.setenv("RAY_ADDRESS", "auto")
    check_address()


def test_an_empty_ray_tmpdir_is_none(environment):
    environment.setenv("RAY_TMPDIR", "")
    assert str(settle_temporary_directory()) == "/tmp/ray"
    assert "RAY_TMPDIR" not in os.environ


def test_a_relative_one_is_made_absolute(environment, tmp_path):
    short = tmp_path / "r"
    environment.setenv("RAY_TMPDIR", "r")
    if len(str(short)) + len(SOCKET) > SOCKET_BYTES:
        with pytest.raises(UserError, match="is too long"):
            settle_temporary_directory()
    environment.chdir("/tmp")
    environment.setenv("RAY_TMPDIR", "./")
    assert str(settle_temporary_directory()) == "/tmp/ray"
    assert os.environ["RAY_TMPDIR"] == "/tmp"


def test_a_long_one_is_refused_and_a_long_tmpdir_passed_over(environment, tmp_path):
    long = str(tmp_path / ("x" * 90))
    environment.setenv("RAY_TMPDIR", long)
    with pytest.raises(UserError, match=r"RAY_TMPDIR: .* is too long: .* at most \d\d bytes"):
        settle_temporary_directory()
    environment.delenv("RAY_TMPDIR")
    environment.setenv("TMPDIR", long)
    assert str(settle_temporary_directory()) == "/tmp/ray"
    assert os.environ["RAY_TMPDIR"] == "/tmp"


def test_one_that_cannot_be_written_is_named(environment, tmp_path):
    environment.setenv("RAY_TMPDIR", "/proc/ftray")
    with pytest.raises(UserError, match=r"RAY_TMPDIR: Ray keeps its session in /proc/ftray/ray, which cannot be w"):
        settle_temporary_directory()


def test_cores_are_those_that_may_be_used(monkeypatch, tmp_path):
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr(machine, "CGROUP_V1", (tmp_path / "none", tmp_path / "none"))
    for text, cores in (("200000 100000", 2), ("max 100000", 4), ("50000 100000", 1), ("nonsense", 4)):
        (tmp_path / "cpu.max").write_text(text)
        monkeypatch.setattr(machine, "CGROUP_V2", tmp_path / "cpu.max")
        assert machine.usable_cores() == cores, text
    monkeypatch.setattr(machine, "CGROUP_V2", tmp_path / "none")
    (tmp_path / "quota").write_text("-1\n")
    (tmp_path / "period").write_text("100000\n")
    monkeypatch.setattr(machine, "CGROUP_V1", (tmp_path / "quota", tmp_path / "period"))
    assert machine.usable_cores() == 4


def test_a_user_without_a_name_has_a_number(monkeypatch):
    def getuser() -> str:
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr(machine.getpass, "getuser", getuser)
    assert machine.user_name() == f"uid-{os.getuid()}"
