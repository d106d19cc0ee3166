"""How a driver ends when asked to: Ctrl-C, SIGTERM (a scheduler, a preempted machine), SIGHUP (a terminal is closed).

Before its work has begun any of them ends it at once. While it works the first saves and ends; a second Ctrl-C ends at
once, and other signals change nothing.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from ftray.errors import InterruptedRunError, TerminatedRunError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SPOKEN = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP"}


class Stop:
    """What was asked for. In another thread than the main one no signal arrives."""

    def __init__(self) -> None:
        self.number: signal.Signals | None = None  # the first
        self._save: Callable[[], None] | None = None
        self._is_ending = False

    def take_over(self) -> None:
        """Sets the handlers; again after `ray.init`, which sets one for SIGTERM that ends the process at once. One that
        was ignored stays so (`nohup`)."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                    signal.signal(number, self._handle)

    def saves_by(self, save: Callable[[], None]) -> None:
        """From now on there is work to save: the first signal calls this, and the driver waits for its end."""
        self._save = save

    def error(self, message: str) -> InterruptedRunError:
        is_asked_by_machine = self.number in (signal.SIGTERM, signal.SIGHUP)
        return (TerminatedRunError if is_asked_by_machine else InterruptedRunError)(message)

    @property
    def asked_by(self) -> str | None:
        return SPOKEN[self.number] if self.number is not None else None

    def _handle(self, number: int, _: Any) -> None:
        is_first = self.number is None
        if is_first:
            self.number = signal.Signals(number)
        if is_first and self._save is not None:
            self._save()
        elif not self._is_ending and (is_first or number == signal.SIGINT):
            self._is_ending = True  # once: what is said at the end is not cut short
            raise KeyboardInterrupt


@contextlib.contextmanager
def stoppable() -> Iterator[Stop]:
    """The handlers of before come back at the end. After SIGTERM or SIGHUP those two are ignored instead: schedulers
    send them again while the process says how to go on."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    earlier = {number: signal.getsignal(number) for number in SIGNALS}
    stop.take_over()
    try:
        yield stop
    finally:
        ends = stop.number in (signal.SIGTERM, signal.SIGHUP)
        for number, handler in earlier.items():
            signal.signal(number, signal.SIG_IGN if ends and number != signal.SIGINT else handler)


@contextlib.contextmanager
def handled(number: signal.Signals, handler: Any) -> Iterator[None]:
    """In another thread than the main one no signal arrives."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, earlier)
