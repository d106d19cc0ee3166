"""TensorBoard event files in the run directory, from rank 0: `tensorboard --logdir runs` shows all runs."""

import os
from pathlib import Path
from typing import Any

TENSORBOARD = "tensorboard"


class TensorBoard:
    """A writer, or nothing at all when it is off."""

    def __init__(self, directory: Path, *, enabled: bool, resume_step: int):
        self._writer: Any = None
        if enabled:
            os.environ.setdefault("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION", "python")
            from tensorboardX import SummaryWriter

            # Steps after the checkpoint that is gone on from are hidden: they are trained again.
            self._writer = SummaryWriter(
                str(directory / TENSORBOARD), purge_step=resume_step + 1 if resume_step else None
            )

    def log(self, record: dict[str, Any]) -> None:
        if self._writer is None:
            return
        for key, value in record.items():
            if key != "step":
                self._writer.add_scalar(
                    ("evaluation/" if key.startswith("eval") else "training/") + key, value, record["step"]
                )

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
