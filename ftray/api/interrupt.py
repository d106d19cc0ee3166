"""What a call leaves when it is stopped: from the command line the process ends with it, in a notebook it lives on."""

import contextlib
import threading
from collections.abc import Callable, Iterator

from ftray.errors import InterruptedRunError

WAIT_S = 120.0


@contextlib.contextmanager
def nothing_left(stop: Callable[[], None]) -> Iterator[None]:
    """After an interruption: `stop` asks the workers to save and end, and the call returns when they have; a session of
    Ray that it had started ends too."""
    import ray

    owns_ray = not ray.is_initialized()
    try:
        yield
    except InterruptedRunError:
        stop()
        for thread in threading.enumerate():
            if thread.name == "ray-fit":  # cluster/fit_thread.py
                thread.join(timeout=WAIT_S)
        if owns_ray and ray.is_initialized():
            ray.shutdown()
        raise
