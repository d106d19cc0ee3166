"""Population-based training (Jaderberg et al. 2017, arXiv 1711.09846), in generations.

All trials train for so many steps and wait for each other; then the worst quarter goes on from the checkpoints of the
best quarter (exploit), with their learning rates changed (explore). What is found is a schedule of the rate.
"""

import math
import os
import random
import shutil
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftray.config import RunConfig
from ftray.config.domains import Range
from ftray.storage import write_json
from ftray.tracking.events import record_event
from ftray.train.checkpoints.listing import CHECKPOINTS, is_whole
from ftray.train.job import SCRATCH

RATE = "optimizer.learning_rate"
QUANTILE = 0.25
FACTORS = (0.8, 1.2)


@dataclass(frozen=True)
class Move:
    run: str
    source: str  # the run whose checkpoint it goes on from
    point: dict[str, Any]  # what it goes on with


@dataclass(frozen=True)
class Moved:
    step: int
    run: str
    source: str
    rate: float  # it went on with


def choose_moves(
    values: Mapping[str, float], points: Mapping[str, dict[str, Any]], rates: Range, *, saved: Container[str], seed: str
) -> list[Move]:
    """`values`: losses by run. `saved`: runs that others can take over, since their checkpoint is whole. The same for
    the same generation, so that a sweep that was cut off here repeats it."""
    ranked = sorted(values, key=lambda name: (values[name], name))
    count = min(math.ceil(len(ranked) * QUANTILE), len(ranked) // 2)
    chance = random.Random(seed)
    sources = [name for name in ranked[:count] if name in saved]
    if not sources:
        return []
    moves = []
    for name in ranked[len(ranked) - count :]:
        source = chance.choice(sources)
        rate = points[source][RATE] * chance.choice(FACTORS)
        moves.append(Move(name, source, points[source] | {RATE: min(max(rate, rates.low), rates.high)}))
    return moves


def has_saved(run_directory: Path, *, step: int) -> bool:
    """A save that failed, on a full disk, does not end a run."""
    return is_whole(run_directory / CHECKPOINTS / f"step-{step}")


def take_over(target: Path, source: Path, config: RunConfig, *, step: int) -> None:
    """The target's run goes on from the source's checkpoint, with another config. May be done again after a crash."""
    checkpoint = f"step-{step}"
    staging = target / SCRATCH / checkpoint
    shutil.rmtree(staging, ignore_errors=True)
    shutil.copytree(source / CHECKPOINTS / checkpoint, staging)
    shutil.rmtree(target / CHECKPOINTS, ignore_errors=True)
    (target / CHECKPOINTS).mkdir()
    os.replace(staging, target / CHECKPOINTS / checkpoint)
    write_json(target / "config.json", config.model_dump(mode="json"))
    record_event(target, "took_over", source=source.name, step=step, learning_rate=config.optimizer.learning_rate)
