"""Weights & Biases, from rank 0. Its files stay inside the run directory; it never prompts and never ends a run.

The key reaches the workers as WANDB_API_KEY: the driver passes on the one of its own environment, or a cluster
sets it on the nodes. Without a key `auto` runs offline, and `wandb sync RUN_DIR/wandb/offline-*` uploads later.
"""

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ftray.config.run import TrackingConfig


class Wandb:
    """A wandb run, or nothing at all when it is off or would not start."""

    def __init__(
        self, config: TrackingConfig, *, run_name: str, settings: dict, directory: Path, log: Callable[[str], None]
    ):
        self._run: Any = None
        mode = choose_mode(config.wandb, has_key="WANDB_API_KEY" in os.environ)
        if mode == "disabled":
            return
        os.environ["WANDB_SILENT"] = "true"
        import wandb

        try:
            self._run = wandb.init(
                project=config.wandb_project,
                group=config.wandb_group,
                tags=config.tags,
                notes=config.notes,
                name=run_name,
                id=run_id(directory),
                resume="allow",
                reinit="create_new",  # a fused group has several at a time
                config=settings,
                dir=str(directory),
                mode=mode,  # pyright: ignore[reportArgumentType]
            )
        except (wandb.Error, OSError) as error:
            log(f"wandb did not start and is left out: {error}")

    def log(self, record: dict[str, Any]) -> None:
        if self._run is not None:
            self._run.log({key: value for key, value in record.items() if key != "step"}, step=record["step"])

    def finish(self) -> None:
        if self._run is not None:
            self._run.finish()


def run_id(directory: Path) -> str:
    """Of this run directory: a resumed run goes on under it, a run started over gets another."""
    path = directory / "wandb_id"
    if not path.is_file():
        path.write_text(uuid.uuid4().hex[:12])
    return path.read_text()


def choose_mode(setting: str, *, has_key: bool) -> str:
    """`online` without a key would ask for one: it becomes offline."""
    if setting == "off":
        return "disabled"
    return "online" if has_key and setting != "offline" else "offline"
