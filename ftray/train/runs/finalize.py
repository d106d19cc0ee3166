"""After the workers: is the run complete, and what does it leave at the top of its directory?"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ftray.errors import DamagedError
from ftray.model.base import BaseModel, prepare_base
from ftray.storage import verify_directory, write_json
from ftray.tracking.report import write_report
from ftray.tracking.runs import RESULT, read_run
from ftray.train.checkpoints.listing import ADAPTER, read_state
from ftray.train.job import SCRATCH
from ftray.train.prepared_data import PreparedData
from ftray.train.runs.handle import RunHandle


def describe_interruption(run: RunHandle) -> str:
    checkpoint = run.newest_checkpoint()
    saved = f"the checkpoint {run.uri_of(checkpoint)} stands" if checkpoint else "no checkpoint was written yet"
    return f"{run.config.name}: stopped; {saved}"


def finalize_run(
    run: RunHandle, checkpoint: Path, base: BaseModel, data: PreparedData, *, seconds: float
) -> dict[str, Any]:
    """Puts the last checkpoint's adapter (or model) at the top of the run directory and writes result.json last."""
    run.fetch_artifact(checkpoint, whole=run.config.adapter is None)
    put_artifact(run.artifact, checkpoint, base, run_name=run.config.name)
    result = result_of(run, checkpoint, base, data) | {"seconds": seconds}
    write_json(run.path / RESULT, result)
    write_report(run.path)
    run.keep_artifact(run.artifact)
    return result


def remake_artifact(run: RunHandle, log: Callable[[str], None]) -> None:
    """What a finished run left is whole, or made again from its last checkpoint. Raises `DamagedError`."""
    try:
        run.verify_artifact()
        return
    except DamagedError as error:
        problem = error
    checkpoint = run.newest_checkpoint(log=log)
    assert run.finished is not None
    if checkpoint is None or read_state(checkpoint).step != run.finished["steps"]:
        raise DamagedError(f"{problem}, and its last checkpoint is gone as well; start over with --fresh")
    log(f"{problem}; it is made again from {run.uri_of(checkpoint)}")
    run.fetch_artifact(checkpoint, whole=run.config.adapter is None)
    base = prepare_base(run.config.base_model, chat=run.config.chat)
    put_artifact(run.artifact, checkpoint, base, run_name=run.config.name)
    run.keep_artifact(run.artifact)


def put_artifact(artifact: Path, checkpoint: Path, base: BaseModel, *, run_name: str) -> None:
    scratch = artifact.parent / SCRATCH
    staging = scratch / artifact.name
    shutil.rmtree(staging, ignore_errors=True)
    if artifact.name == ADAPTER:
        shutil.copytree(checkpoint / ADAPTER, staging)
    else:
        from ftray.train.checkpoints.export import export_model  # torch, which a driver of adapters does without

        export_model(checkpoint, staging, base, metadata={"run": run_name, "step": read_state(checkpoint).step})
    verify_directory(staging)
    shutil.rmtree(artifact, ignore_errors=True)
    os.replace(staging, artifact)
    shutil.rmtree(scratch)


def result_of(run: RunHandle, checkpoint: Path, base: BaseModel, data: PreparedData) -> dict[str, Any]:
    recorded = read_run(run.path)
    return {
        "status": "finished",
        "name": run.config.name,
        "steps": read_state(checkpoint).step,
        "final_loss": recorded.final_loss,
        "final_eval_loss": recorded.final_eval_loss,
        "tokens_per_s": recorded.tokens_per_s,
        "data_digest": data.digest,
        "data": {"train": data.train.counts()} | ({"eval": data.eval.counts()} if data.eval is not None else {}),
        "base_model": base.name,
        "base_fingerprint": base.fingerprint,
        "output": run.uri_of(run.artifact),
        "events": recorded.events,
    }
