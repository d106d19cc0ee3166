"""A handler of SIGTERM for as long as something runs, set over Ray's own."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def on_sigterm(react: Callable[[], None]) -> Iterator[threading.Event]:
    """Yields what is set before `react` is called."""
    terminated = threading.Event()

    def handle(*_: Any) -> None:
        terminated.set()
        react()

    with handled(signal.SIGTERM, handle):  # after ray.init, which sets one that ends the process at once
        yield terminated


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
