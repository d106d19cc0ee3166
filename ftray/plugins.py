"""A user's own code, named in a config as `module:NAME` and looked for where the command runs as well: an objective, a
task, a data format, a callback."""

import importlib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

from pydantic import Field

from ftray.errors import UserError

T = TypeVar("T")
FORM = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
PluginName = Annotated[str, Field(pattern=f"^{FORM.pattern}$")]


def is_plugin(reference: str) -> bool:
    return FORM.fullmatch(reference) is not None


def load_function(reference: str, *, key: str) -> Callable[..., Any]:
    """Raises `UserError` as `load_plugin` does."""
    return cast(Callable[..., Any], load_plugin(reference, cast(type, Callable), key=key))


def load_plugin(reference: str, kind: type[T], *, key: str) -> T:
    """Raises `UserError` that names the key where there is no such module or name, or where it is no `kind`."""
    module_name, _, name = reference.partition(":")
    found = getattr(import_module(module_name, reference, key=key), name, None)
    if found is None:
        raise UserError(f"{key}: {reference}: the module {module_name} has no {name}")
    if not isinstance(found, kind):
        wanted = "a function" if kind is Callable else f"of type {kind.__name__}"
        raise UserError(f"{key}: {reference}: is of type {type(found).__name__}, and must be {wanted}")
    return found


def import_directory() -> Path:
    """The working directory, on Python's path from now on; Ray hands that to the workers."""
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)
    return Path(here)


def import_module(module_name: str, reference: str, *, key: str) -> Any:
    here = import_directory()
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{key}: {reference}: no module named {error.name!r}; it is looked for in {here} and where packages are"
        ) from None
