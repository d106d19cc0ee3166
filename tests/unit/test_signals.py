"""What Ctrl-C, SIGTERM and SIGHUP do to a driver, before its work has begun and while it works."""

import os
import signal

import pytest

from ftray.cluster.signals import SIGNALS, stoppable
from ftray.errors import InterruptedRunError, TerminatedRunError


@pytest.fixture(autouse=True)
def handlers():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_before_the_work_any_ends_it_at_once(number):
    error, code = (InterruptedRunError, 1) if number == signal.SIGINT else (TerminatedRunError, 143)
    before = signal.getsignal(number)
    with stoppable() as stop:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
        found = stop.error("stopped")
        assert (type(found), found.exit_code) == (error, code)
    assert signal.getsignal(number) is (before if number == signal.SIGINT else signal.SIG_IGN)


@pytest.mark.parametrize("number", SIGNALS)
def test_while_it_works_the_first_saves(number):
    saved = []
    with stoppable() as stop:
        stop.saves_by(lambda: saved.append(stop.asked_by))
        os.kill(os.getpid(), number)
        for other in (signal.SIGTERM, signal.SIGHUP, signal.SIGTERM):  # schedulers send it twice
            os.kill(os.getpid(), other)
        assert saved == [{"SIGINT": "Ctrl-C"}.get(number.name, number.name)]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.error("stopped").exit_code == (1 if number == signal.SIGINT else 143)


def test_a_terminal_that_does_not_matter_stays_so():
    """`nohup` ignores SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stoppable() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.number is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_handler_that_ray_sets_is_replaced():
    with stoppable() as stop:
        signal.signal(signal.SIGTERM, lambda number, _: os._exit(number))  # as `ray.init` does
        stop.take_over()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
