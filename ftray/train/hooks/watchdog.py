"""A worker that makes no progress writes where it stands and ends, so that Ray starts all workers again from the last
checkpoint, instead of half an hour of silence.

Python's own `faulthandler` does the watching, in a thread that needs no interpreter lock: a worker that is stuck inside
a library is found too. Ranks that wait for another stand in a collective; the one to look at is the one that does not,
or that wrote nothing at all.
"""

import faulthandler
import re
import time
from pathlib import Path

HANGS = "hangs"
# The ranks' timers do not end at once: a rank is silent only if it has written nothing this long after the first.
SILENT_AFTER_S = 5.0
# Where a rank stands that waits for the others.
COLLECTIVES = re.compile(r"/torch/distributed/|/deepspeed/comm/|in all_reduce|in barrier|/ray/train/")
FRAME = re.compile(r'^  File "(?P<file>.+)", line (?P<line>\d+) in (?P<function>.+)$', re.MULTILINE)


class Watchdog:
    def __init__(self, run_directory: Path, *, rank: int, timeout_s: float):
        path = hang_file(run_directory, rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w")
        self._timeout_s = timeout_s

    def beat(self) -> None:
        """Progress: the time starts anew."""
        faulthandler.dump_traceback_later(self._timeout_s, exit=True, file=self._file)

    def close(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._file.close()


def hang_file(run_directory: Path, rank: int) -> Path:
    return run_directory / HANGS / f"rank-{rank}.txt"


class HangReader:
    """What the ranks wrote, as the driver finds it."""

    def __init__(self, run_directory: Path):
        self._run_directory = run_directory
        self._first_seen: float | None = None

    def poll(self, *, world_size: int) -> str | None:
        """A hang in one line, once all ranks have written, or some are silent; else None."""
        stacks = {}
        for rank in range(world_size):
            path = hang_file(self._run_directory, rank)
            stacks[rank] = path.read_text() if path.is_file() else ""
        if not any(stacks.values()):
            self._first_seen = None
            return None
        self._first_seen = self._first_seen or time.monotonic()
        if not all(stacks.values()) and time.monotonic() - self._first_seen < SILENT_AFTER_S:
            return None
        clear_hangs(self._run_directory)
        self._first_seen = None
        return describe_hang(stacks)


def describe_hang(stacks: dict[int, str]) -> str:
    silent = [rank for rank, stack in stacks.items() if not stack]
    working = [rank for rank, stack in stacks.items() if stack and not COLLECTIVES.search(main_thread(stack))]
    if silent:
        return f"rank {silent[0]} stands still and answers nothing; the others wait for it"
    rank = working[0] if working else 0
    frame = FRAME.search(main_thread(stacks[rank]))
    where = f"{frame['file']}:{frame['line']} in {frame['function']}" if frame else "an unknown place"
    return f"rank {rank} stands still at {where}"


def main_thread(stack: str) -> str:
    """Of faulthandler's dump: the thread that it lists last is the main one."""
    return stack.rpartition("\nThread ")[2] or stack


def clear_hangs(run_directory: Path) -> None:
    for path in (run_directory / HANGS).glob("rank-*.txt"):
        path.unlink()
