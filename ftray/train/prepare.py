"""What is known before a start, in well under a second: nothing here imports torch or Ray."""

from ftray.config import RunConfig
from ftray.data.formats import own_format, own_transform
from ftray.data.sources import check_source
from ftray.model.base import check_base_name
from ftray.objectives import objective_of
from ftray.train.hooks.own_callbacks import own_callbacks
from ftray.train.runs.claim import refuse_another_config, refuse_running, refuse_vanishing_directory


def prepare(config: RunConfig, *, fresh: bool) -> None:
    """Raises `UserError` for what can never start: names, files, where the run is and whose it is."""
    check_before_anything(config)
    refuse_vanishing_directory(config)
    refuse_running(config)
    if not fresh:
        refuse_another_config(config)


def check_before_anything(config: RunConfig) -> None:
    """What is wrong with the input as far as a file listing can tell."""
    check_base_name(config.base_model)
    check_source("data.train", config.data.train)
    if config.data.eval is not None:
        check_source("data.eval", config.data.eval)
    own_format(config.data, shape=objective_of(config.objective).shape)
    own_transform(config.data)
    own_callbacks(config)
