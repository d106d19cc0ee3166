"""What is known before a start, in well under a second: nothing here imports torch or Ray."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ftray.config import RunConfig
from ftray.data.formats import own_format, own_transform
from ftray.data.sets import check_data
from ftray.model.base import check_base_name
from ftray.objectives import objective_of
from ftray.train.hooks.own_callbacks import Callback, own_callbacks
from ftray.train.runs.claim import refuse_another_config, refuse_running, refuse_vanishing_directory


@dataclass(frozen=True)
class PreparedRun:
    """A run that nothing speaks against as far as a file listing tells."""

    config: RunConfig
    fresh: bool  # an earlier run of this name is set aside
    callbacks: tuple[Callback, ...]
    init_from: Path | str | None = None  # path or URL of the PEFT directory that `adapter.init_from` names


def prepare(config: RunConfig, *, fresh: bool = False, callbacks: Sequence[Callback] = ()) -> PreparedRun:
    """`callbacks`: beside those that the config names. Raises `UserError` for what can never start: names, files, where
    the run is and whose it is."""
    check_before_anything(config)
    refuse_vanishing_directory(config)
    refuse_running(config)
    if not fresh:
        refuse_another_config(config)
    return PreparedRun(config, fresh, (*own_callbacks(config), *callbacks))


def check_before_anything(config: RunConfig) -> None:
    """What is wrong with the input as far as a file listing can tell."""
    check_base_name(config.base_model)
    check_data(config.data)
    own_format(config.data, shape=objective_of(config.objective).shape)
    own_transform(config.data)
