"""`inputs.json`: what a run computes with, by content: a path may change between its parts, what lies there may not."""

from typing import Any

from ftray.errors import UserError
from ftray.model.base import BaseModel
from ftray.storage import read_json, write_json
from ftray.train.checkpoints.listing import read_state
from ftray.train.prepared_data import PreparedData
from ftray.train.runs.handle import INPUTS, RunHandle

WHAT = {
    "base_model": "the base differs from the one that this run began with (its files were changed)",
    "data.train": "the data differ from those that this run was trained on (rows, template or tokenizer)",
    "data.eval": "the data differ from those that this run was evaluated on (rows, template or tokenizer)",
}


def inputs_of(base: BaseModel, data: PreparedData) -> dict[str, Any]:
    """A digest of each, by its key; and the date that a dated chat template writes."""
    evaluation = data.eval.digest() if data.eval is not None else None
    digests = {"base_model": base.fingerprint, "data.train": data.digest, "data.eval": evaluation}
    return digests | ({"date": base.chat.date} if base.chat.date is not None else {})


def check_inputs(run: RunHandle, base: BaseModel, data: PreparedData) -> None:
    """Keeps them at the run's first start. Raises `UserError` where they are others now."""
    now, earlier = inputs_of(base, data), inputs_before(run)
    for key, what in WHAT.items():
        if earlier.get(key) not in (None, now[key]) and now[key] is not None:
            raise UserError(
                f"{key}: {what}; put the old ones back, choose another name (name=...), or start over with --fresh"
            )
    if run.finished is None:
        write_json(run.path / INPUTS, now)


def inputs_before(run: RunHandle) -> dict[str, Any]:
    """What is known of those of the run's earlier parts: nothing before its first step; of ftray 0.1's runs, which have
    no such file, what checkpoint and result say."""
    if not run.has_begun:
        return {}
    if (run.path / INPUTS).is_file():
        return read_json(run.path / INPUTS)
    result = run.finished or {}
    trained_on = read_state(run.resume_from).data_digest if run.resume_from is not None else result.get("data_digest")
    return {"base_model": result.get("base_fingerprint"), "data.train": trained_on}


def date_before(run: RunHandle) -> str | None:
    """That a dated chat template wrote in the run's earlier parts: another day would be other tokens."""
    return inputs_before(run).get("date")
