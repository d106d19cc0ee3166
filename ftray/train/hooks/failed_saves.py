"""Saves that failed, as the driver shows them: a run goes on without them, and whoever watches can still make room."""

import shutil
from pathlib import Path

from ftray.tracking.events import EVENTS, SAVE_FAILED, read_whole_lines

ENOUGH_BYTES = 2**20  # with less, not even the note of a failed save may fit


class FailedSaves:
    def __init__(self, run_directory: Path):
        self._directory = run_directory
        self._num_shown = 0
        self._size = -1
        self._is_full = False

    def poll(self) -> list[str]:
        """Lines to show, of what is new."""
        lines = []
        is_full = shutil.disk_usage(self._directory).free < ENOUGH_BYTES
        if is_full and not self._is_full:
            lines.append(
                f"the disk of {self._directory} is full: checkpoints cannot be written; make room, the run goes on"
            )
        self._is_full = is_full
        path = self._directory / EVENTS
        size = path.stat().st_size if path.is_file() else 0
        if size != self._size:
            self._size = size
            failed = [event for event in read_whole_lines(path) if event.get("event") == SAVE_FAILED]
            lines += [f"{event['message']}; the run goes on and tries again" for event in failed[self._num_shown :]]
            self._num_shown = len(failed)
        return lines
