"""What is known of a sweep before its start. Nothing here imports torch or Ray."""

from dataclasses import dataclass
from pathlib import Path

from ftray.config import RunConfig, Space, SweepConfig
from ftray.data.sources import check_source
from ftray.errors import UserError
from ftray.train.hooks.own_callbacks import own_callbacks
from ftray.train.prepare import check_before_anything
from ftray.train.runs.claim import refuse_vanishing_directory
from ftray.train.runs.store import run_store
from ftray.train.runs.uri import is_stored


@dataclass(frozen=True)
class PreparedSweep:
    """A sweep that nothing speaks against as far as a file listing tells."""

    config: SweepConfig
    space: Space
    base_run: RunConfig


def prepare_sweep(config: SweepConfig, space: Space) -> PreparedSweep:
    """Of all its points: a file that is missing is told before the first trial. Raises `UserError`."""
    runs = [space.config(point) for point in space.points_to_check(config.search)]
    base_run = space.first_run(config)
    refuse_population_in_store(config, base_run)
    if starts := [run.adapter.init_from for run in runs if run.adapter is not None and run.adapter.init_from]:
        raise UserError(
            f"adapter.init_from: {starts[0]}: the trials of a sweep start from their base; fold the adapter into it "
            "(`ftray adapters merge`) and give that as base_model"
        )
    for run in {(run.base_model, run.chat, run.data.model_dump_json()): run for run in runs}.values():
        check_before_anything(run)
    refuse_vanishing_directory(base_run)
    own_callbacks(base_run)
    if config.compare is not None and config.compare.general_text is not None:
        check_source("compare.general_text", config.compare.general_text)
    return PreparedSweep(config, space, base_run)


def sweep_directory(config: SweepConfig, space: Space) -> Path:
    """On this machine."""
    return run_store(space.first_run(config).runs_dir).local(config.name).absolute()


def refuse_population_in_store(config: SweepConfig, run: RunConfig) -> None:
    """Raises `UserError`."""
    if is_stored(run.runs_dir) and config.search.scheduler == "pbt":
        raise UserError(
            "search.scheduler pbt: a population's runs take over each other's checkpoints on a disk, not in an object "
            f"store ({run.runs_dir}); give a path (overrides.runs_dir=/path/on/all/nodes) or another scheduler"
        )
