"""Strict YAML -> typed, frozen objects. Imports neither torch nor ray: a bad file answers at once."""

from ftray.config.load import load_config, parse_config, to_yaml
from ftray.config.run import RunConfig
from ftray.config.serve import ServeConfig

__all__ = ["RunConfig", "ServeConfig", "load_config", "parse_config", "to_yaml"]
