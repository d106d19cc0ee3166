"""What the driver hands to each worker of a fused group."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftray.config import RunConfig
from ftray.config.adapter import AdapterConfig


@dataclass(frozen=True)
class FusedJob:
    base_run: RunConfig  # what all members share
    base_name: str
    train_data: Path | str  # directory of a TokenizedDataset, or its URL
    eval_data: Path | str | None
    data_digest: str
    metric: str
    directory: Path  # of the group, on this machine
    uri: str  # of the group: the path of a directory that all nodes see, or a URL
    attempt: str  # of the sweep: each driver's has a word of its own
    group: int  # its number, where several share a sweep
    slots: int  # members at a time, where memory holds them
    adapters: tuple[AdapterConfig, ...]  # what members may have
    shares_rows: bool | None  # None: to be measured
    coordinator: Any  # handle of a `coordinator.TrialCoordinator`
