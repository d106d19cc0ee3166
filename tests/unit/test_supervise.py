"""A driver that dies is started again; one that ends is not."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ftray.submit import supervise


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(supervise, "PAUSE_S", 0.0)
    kept = {number: signal.getsignal(number) for number in supervise.ASKED}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def driver(log: Path, ends: str) -> list[str]:
    """Notes its start; `ends`: python that runs then, with `tries` so far."""
    code = (
        "import os, pathlib, signal, sys\n"
        f"log = pathlib.Path({str(log)!r}); log.open('a').write('x'); tries = len(log.read_text())\n{ends}"
    )
    return [sys.executable, "-c", code]


KILLED = "os.kill(os.getpid(), signal.SIGKILL)"


def test_it_goes_on_after_a_death(tmp_path, capfd):
    command = driver(tmp_path / "log", f"if tries < 3: {KILLED}\nsys.exit(0)")
    assert supervise.supervise(command, retries=3) == 0
    assert (tmp_path / "log").read_text() == "xxx"
    assert "died of SIGKILL; starts again, 2 tries left" in capfd.readouterr().out


@pytest.mark.parametrize("code", [0, 1, 2, 143])
def test_what_ends_by_itself_has_ended(tmp_path, code):
    assert supervise.supervise(driver(tmp_path / "log", f"sys.exit({code})"), retries=3) == code
    assert (tmp_path / "log").read_text() == "x"


def test_tries_come_to_an_end(tmp_path):
    assert supervise.supervise(driver(tmp_path / "log", KILLED), retries=2) == 137
    assert (tmp_path / "log").read_text() == "xxx"


def test_who_is_asked_to_end_is_not_started_again(tmp_path):
    command = driver(tmp_path / "log", "import time; time.sleep(60)")
    words = [sys.executable, "-m", "ftray.submit.supervise", "3", "--", *command]
    process = subprocess.Popen(words)
    while not (tmp_path / "log").is_file():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 143
    assert (tmp_path / "log").read_text() == "x"
