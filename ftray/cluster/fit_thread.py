"""`fit` of Ray's trainers and tuners beside the main thread, and the reason why it failed."""

import threading
from typing import Any


class Fit(threading.Thread):
    """`fit` of a trainer or tuner, begun beside the main thread; what it raises is kept."""

    def __init__(self, fitted: Any):
        super().__init__(name="ray-fit", daemon=True)
        self._fitted = fitted
        self.failure: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._fitted.fit()
        except Exception as error:  # noqa: BLE001  carried over to the main thread
            self.failure = error


def last_line(error: BaseException) -> str:
    failures = getattr(error, "worker_failures", None)
    if failures:
        rank, cause = next(iter(failures.items()))
        return f"worker {rank}: {(str(cause).strip().splitlines() or [type(cause).__name__])[-1]}"
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
