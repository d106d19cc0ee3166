"""A function called in a process of its own, which ends: what it imports (torch and transformers hold 300 MiB) is not
held by a driver for as long as its run takes. `multiprocessing` would import the caller's main module again there."""

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any, TypeVar

from ftray.errors import FtrayError

T = TypeVar("T")
POLL_S = 0.1
GRACE_S = 5.0
CALL, OUTCOME = "call.pickle", "outcome.pickle"


def in_child_process(
    function: Callable[..., T],
    *arguments: Any,
    log: Callable[[str], None],
    cancelled: threading.Event | None = None,
    **options: Any,
) -> T:
    """`function(*arguments, log, cancelled, **options)`, where each line that it logs is logged here. It is pickled by
    its name, its arguments and result by value. Raises what it raises; `CancelledError` soon after `cancelled` is
    set, for which the function is told by its own event and ended where it does not look."""
    cancelled = cancelled or threading.Event()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with tempfile.TemporaryDirectory(prefix="ftray-child-") as scratch:
        (Path(scratch) / CALL).write_bytes(pickle.dumps((function, arguments, options)))
        command = [sys.executable, "-m", "ftray.child_process", scratch]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
            assert child.stdout is not None
            reader = threading.Thread(target=log_lines, args=(child.stdout, log), daemon=True)
            reader.start()
            try:
                while child.poll() is None:
                    if cancelled.wait(POLL_S):
                        raise CancelledError
            finally:
                end(child)
            reader.join()
        outcome = Path(scratch) / OUTCOME
        if not outcome.is_file():
            raise FtrayError(f"the process that runs {function.__name__} ended with status {child.returncode}")
        value, error = pickle.loads(outcome.read_bytes())
    if error is not None:
        raise error
    return value


def end(child: "subprocess.Popen[str]") -> None:
    child.terminate()
    try:
        child.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        child.kill()


def log_lines(stream: Any, log: Callable[[str], None]) -> None:
    for line in stream:
        log(line.rstrip("\n"))


def answer_call(scratch: Path) -> None:
    """The child's side."""
    value, error = None, None
    cancelled = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):  # Ctrl-C reaches it as well
        signal.signal(number, lambda *_: cancelled.set())
    try:
        function, arguments, options = pickle.loads((scratch / CALL).read_bytes())
        value = function(*arguments, log=print_line, cancelled=cancelled, **options)
    except Exception as raised:  # noqa: BLE001  the caller raises it
        error = raised
        error.add_note(traceback.format_exc())
    outcome = scratch / f"{OUTCOME}.new"
    outcome.write_bytes(pickle.dumps((value, error)))
    outcome.replace(scratch / OUTCOME)


def print_line(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    answer_call(Path(sys.argv[1]))
