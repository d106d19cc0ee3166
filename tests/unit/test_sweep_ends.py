"""How a sweep ends before its end."""

import os
import signal
import time

import pytest

from ftray.errors import InterruptedRunError, TerminatedRunError
from ftray.sweep import launch


@pytest.mark.parametrize(
    ("number", "error", "code"), [(signal.SIGTERM, TerminatedRunError, 143), (signal.SIGINT, InterruptedRunError, 1)]
)
def test_a_signal_ends_it_with_what_is_known(number, error, code, tmp_path, monkeypatch):
    def search(*_, **__):
        os.kill(os.getpid(), number)
        time.sleep(10)

    class SweepState:
        class config:
            name = "rates"

    monkeypatch.setattr(launch, "search", search)
    monkeypatch.setattr(launch, "look_into", lambda directory: None)
    monkeypatch.setattr(launch, "describe_state", lambda study: "3 of 8 trials are over")
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(error, match="rates: stopped; 3 of 8 trials are over") as ended:
        launch.search_in(tmp_path, SweepState(), log=print)  # pyright: ignore
    assert type(ended.value) is error
    assert ended.value.exit_code == code
    assert signal.getsignal(signal.SIGTERM) is (signal.SIG_IGN if number == signal.SIGTERM else before)
    signal.signal(signal.SIGTERM, before)
