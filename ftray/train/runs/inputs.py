"""`inputs.json`: what a run computes with, by content: a path may change between its parts, what lies there may not."""

from typing import Any

from ftray.errors import UserError
from ftray.model.base import BaseModel
from ftray.storage import read_json, write_json
from ftray.train.prepared_data import PreparedData
from ftray.train.runs.handle import INPUTS, RunHandle

WHAT = {
    "base_model": "the base differs from the one that this run began with (its files were changed)",
    "data.train": "the data differ from those that this run was trained on (rows, template or tokenizer)",
    "data.eval": "the data differ from those that this run was evaluated on (rows, template or tokenizer)",
}


def inputs_of(base: BaseModel, data: PreparedData) -> dict[str, Any]:
    """A digest of each, by its key."""
    evaluation = data.eval.digest() if data.eval is not None else None
    return {"base_model": base.fingerprint, "data.train": data.digest, "data.eval": evaluation}


def check_inputs(run: RunHandle, base: BaseModel, data: PreparedData) -> None:
    """Keeps them at the run's first start. Raises `UserError` where they are others now."""
    path, now = run.path / INPUTS, inputs_of(base, data)
    if not run.has_begun or not path.is_file():
        if run.finished is None:
            write_json(path, now)
        return
    earlier = read_json(path)
    for key, what in WHAT.items():
        if earlier.get(key) not in (None, now[key]) and now[key] is not None:
            raise UserError(
                f"{key}: {what}; put the old ones back, choose another name (name=...), or start over with --fresh"
            )
