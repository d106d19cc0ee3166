"""After the workers: is the run complete, and what does it leave at the top of its directory?"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftray.config import RunConfig
from ftray.data.dataset import TokenizedDataset
from ftray.data.plan import plan_steps
from ftray.errors import FtrayError
from ftray.model.base import BaseModel
from ftray.storage import verify_directory, write_json
from ftray.tracking.report import write_report
from ftray.tracking.runs import RESULT, read_run
from ftray.train.checkpoints.checkpoint import ADAPTER, read_state
from ftray.train.checkpoints.export import export_model
from ftray.train.job import SCRATCH
from ftray.train.runs.directory import RunDirectory


@dataclass(frozen=True)
class PreparedData:
    train: TokenizedDataset
    eval: TokenizedDataset | None
    digest: str


def num_steps(config: RunConfig, dataset: TokenizedDataset) -> int:
    return plan_steps(config, dataset.lengths).num_steps(epochs=config.epochs, max_steps=config.max_steps)


def is_complete(checkpoint: Path | None, config: RunConfig, data: PreparedData) -> bool:
    return checkpoint is None or read_state(checkpoint).step == num_steps(config, data.train)


def ray_logs() -> str:
    return "/tmp/ray/session_latest/logs"


def describe_interruption(config: RunConfig, directory: RunDirectory) -> str:
    checkpoint = directory.newest_checkpoint()
    saved = f"the checkpoint {directory.uri_of(checkpoint)} stands" if checkpoint else "no checkpoint was written yet"
    return f"{config.name}: stopped; {saved}"


def finalize_run(
    config: RunConfig,
    directory: RunDirectory,
    checkpoint: Path | None,
    base: BaseModel,
    data: PreparedData,
    *,
    seconds: float,
) -> dict[str, Any]:
    """As `finish`, wherever the run lies."""
    stored, path = directory.stored, directory.path
    if stored is None:
        return finalize(config, path, checkpoint, base, data, seconds=seconds)
    if checkpoint is not None:
        stored.checkpoints.fetch_artifact(checkpoint, whole=config.adapter is None)
    result = finalize(config, path, checkpoint, base, data, seconds=seconds, uri=stored.url)
    stored.sync(at_once=True)  # where another driver has taken over, it ends here
    stored.store_artifact(path / artifact_of(config))
    return result


def artifact_of(config: RunConfig) -> str:
    return ADAPTER if config.adapter is not None else "model"


def finalize(
    config: RunConfig,
    path: Path,
    checkpoint: Path | None,
    base: BaseModel,
    data: PreparedData,
    *,
    seconds: float,
    uri: str | None = None,
) -> dict[str, Any]:
    """Puts the last checkpoint's adapter (or model) at the top of the run directory and writes result.json last.

    `place`: where users find that directory; default `path`.
    """
    if checkpoint is None:
        raise FtrayError(f"{path}: the run ended without a checkpoint; the workers' logs are in {ray_logs()}")
    artifact = artifact_of(config)
    staging = path / SCRATCH / artifact
    shutil.rmtree(staging, ignore_errors=True)
    if config.adapter is not None:
        shutil.copytree(checkpoint / ADAPTER, staging)
    else:
        export_model(checkpoint, staging, base, metadata={"run": config.name, "step": read_state(checkpoint).step})
    verify_directory(staging)
    shutil.rmtree(path / artifact, ignore_errors=True)
    os.replace(staging, path / artifact)
    shutil.rmtree(path / SCRATCH)
    run = read_run(path)
    result = {
        "status": "finished",
        "name": config.name,
        "steps": read_state(checkpoint).step,
        "final_loss": run.final_loss,
        "final_eval_loss": run.final_eval_loss,
        "tokens_per_s": run.tokens_per_s,
        "seconds": seconds,
        "data_digest": data.digest,
        "data": {"train": data.train.counts()} | ({"eval": data.eval.counts()} if data.eval is not None else {}),
        "base_model": base.name,
        "base_fingerprint": base.fingerprint,
        "output": f"{uri or path}/{artifact}",
        "events": run.events,
    }
    write_json(path / RESULT, result)
    write_report(path)
    return result
