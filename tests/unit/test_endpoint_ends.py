"""How `ftray serve` ends. On a cluster SIGTERM comes twice: Ray sends it to a job's every process, and the one that
starts drivers again passes it on."""

import os
import signal
import sys
import threading

import pytest

import ftray.cluster.session
import ftray.serve.app
from ftray.cli.serve import run_endpoint
from ftray.cluster.signals import SIGNALS
from ftray.config import parse_config


@pytest.fixture
def handlers():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("during_start", [False, True])
def test_a_second_sigterm_does_not_end_the_end(monkeypatch, capsys, handlers, during_start):
    steps = []

    def start_ray() -> bool:  # as `ray.init` does it
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))
        return True

    def start_endpoint(_) -> str:
        if during_start:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        steps.append("started")
        return "http://127.0.0.1:8000"

    def stop_endpoint() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        steps.append("stopped")

    monkeypatch.setattr(ftray.cluster.session, "start_ray", start_ray)
    monkeypatch.setattr(ftray.serve.app, "start_endpoint", start_endpoint)
    monkeypatch.setattr(ftray.serve.app, "stop_endpoint", stop_endpoint)
    settings = parse_config("kind: serve\nbase_model: base\nadapters: {registry: r}\n", kind="serve", source="test")
    if during_start:
        with pytest.raises(KeyboardInterrupt):
            run_endpoint(settings, detach=False)
        assert steps == ["stopped"]
    else:
        run_endpoint(settings, detach=False)
        assert steps == ["started", "stopped"]
        assert "\nstopping\n" in capsys.readouterr().out
