"""ftray: fine-tuning of language models on Ray, from a base model to a live, measured, swappable adapter.

    run = ftray.train("run.yaml", "optimizer.learning_rate=1e-4")
    ftray.Registry("registry").publish(...)
    ftray.load("support@prod").chat("Where is my card?")

What stands here loads when it is first used: `import ftray` imports nothing else.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ftray.api.endpoint import Endpoint, serve
    from ftray.api.evaluate import evaluate
    from ftray.api.model import Model, load
    from ftray.api.run import Run, train
    from ftray.api.step_by_step import LocalTraining, open_training
    from ftray.api.sweep import Sweep, sweep
    from ftray.errors import FtrayError, UserError
    from ftray.registry import Registry

HOMES = {
    "Endpoint": "ftray.api.endpoint",
    "FtrayError": "ftray.errors",
    "LocalTraining": "ftray.api.step_by_step",
    "Model": "ftray.api.model",
    "Registry": "ftray.registry",
    "Run": "ftray.api.run",
    "Sweep": "ftray.api.sweep",
    "UserError": "ftray.errors",
    "evaluate": "ftray.api.evaluate",
    "load": "ftray.api.model",
    "open_training": "ftray.api.step_by_step",
    "serve": "ftray.api.endpoint",
    "sweep": "ftray.api.sweep",
    "train": "ftray.api.run",
}

__all__ = [
    "Endpoint",
    "FtrayError",
    "LocalTraining",
    "Model",
    "Registry",
    "Run",
    "Sweep",
    "UserError",
    "evaluate",
    "load",
    "open_training",
    "serve",
    "sweep",
    "train",
]


def offered(name: str) -> Any:
    return getattr(import_module(HOMES[name]), name)


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'ftray' has no attribute {name!r}")
    return offered(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class CallablePackage(ModuleType):
    """`ftray.train`, `sweep`, `serve` and `evaluate` are rooms of the code; called, they are functions of the API."""

    def __reduce__(self) -> Any:
        return import_module, (self.__name__,)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return offered(self.__name__.rpartition(".")[2])(*arguments, **options)

    @property
    def __signature__(self) -> Any:
        import inspect

        return inspect.signature(offered(self.__name__.rpartition(".")[2]))


class Package(ModuleType):
    def __reduce__(self) -> Any:
        """By name, as cloudpickle takes plain modules: functions that Ray ships may name this one."""
        return import_module, (self.__name__,)

    def __setattr__(self, name: str, value: Any) -> None:
        """Importing a room sets it here, which would hide the function of its name."""
        if name in HOMES and isinstance(value, ModuleType):
            value.__class__ = CallablePackage
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = Package
