"""Strict YAML -> typed, frozen objects. Imports neither torch nor ray: a bad file answers at once."""

from ftray.config.load import load_config, parse_config, to_yaml
from ftray.config.pipeline import PipelineConfig
from ftray.config.run import RunConfig
from ftray.config.serve import ServeConfig
from ftray.config.space import Space, load_sweep
from ftray.config.sweep import SweepConfig

__all__ = [
    "PipelineConfig",
    "RunConfig",
    "ServeConfig",
    "Space",
    "SweepConfig",
    "load_config",
    "load_sweep",
    "parse_config",
    "to_yaml",
]
