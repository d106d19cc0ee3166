"""TensorBoard event files in the run directory, from rank 0: `tensorboard --logdir runs` shows all runs."""

import contextlib
import os
from pathlib import Path
from typing import Any

TENSORBOARD = "tensorboard"


class TensorBoard:
    """A writer, or nothing when it is off, or once a full disk has ended it: a run does not end for its plots."""

    def __init__(self, directory: Path, *, enabled: bool, resume_step: int):
        self._writer: Any = None
        if enabled:
            os.environ.setdefault("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION", "python")
            from tensorboardX import SummaryWriter

            # Steps after the checkpoint that is gone on from are hidden: they are trained again.
            purge = resume_step + 1 if resume_step else None
            with contextlib.suppress(OSError):
                self._writer = SummaryWriter(str(directory / TENSORBOARD), purge_step=purge)

    def log(self, record: dict[str, Any]) -> None:
        for key, value in record.items():
            if key not in ("step", "time") and self._writes():
                group = "evaluation" if key.startswith("eval") else "training"
                self._writer.add_scalar(f"{group}/{key}", value, record["step"])

    def close(self) -> None:
        if self._writes():
            with contextlib.suppress(OSError):
                self._writer.close()

    def _writes(self) -> bool:
        """tensorboardX writes in a thread, which a full disk ends; after that its queue would fill and block."""
        if self._writer is not None and not self._writer.file_writer.event_writer._worker.is_alive():
            self._writer = None
        return self._writer is not None
