"""A user's own callbacks: functions that get each record of metrics.jsonl, where the driver runs."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ftray.config import RunConfig
from ftray.errors import InterruptedRunError
from ftray.plugins import load_function

Records = list[dict[str, Any]]
Callback = Callable[[dict[str, Any]], None]


def own_callbacks(config: RunConfig) -> list[Callback]:
    """Those that the config names. Raises `UserError`."""
    return [load_function(name, key=f"callbacks.{i}") for i, name in enumerate(config.callbacks)]


@contextlib.contextmanager
def calling(callbacks: Sequence[Callback], *, stop: Callable[[], None]) -> Iterator[Callable[[Records], None]]:
    """What the records are given to. A callback that raises calls `stop`, which lets the workers save and end, and is
    called no more; what it raised is raised at the end."""
    failures: list[Exception] = []

    def on_metrics(records: Records) -> None:
        try:
            for record in records:
                for callback in () if failures else callbacks:
                    callback(record)
        except Exception as error:  # noqa: BLE001  the caller's own
            failures.append(error)
            stop()

    try:
        yield on_metrics
    except InterruptedRunError:
        if failures:
            raise failures[0] from None
        raise
    if failures:
        raise failures[0]
