"""A user's own code in a job: what the configs name as `module:NAME` must be in the upload, where the job finds it."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ftray.config.space import load_any
from ftray.errors import UserError
from ftray.plugins import import_directory, is_plugin

KEYS = ("type", "format", "transform", "callbacks")  # of a config, which may name it


def check_own_code(kind: str, loaded: Any, *, root: Path) -> None:
    """`root`: the working directory, which is what the job gets. What is installed is the nodes' own. Raises
    `UserError` where a module is neither."""
    here = import_directory()
    for key, reference in (found for tree in trees_of(kind, loaded) for found in own_code_in(tree)):
        module = reference.partition(":")[0]
        found = directory_of(module)
        if found is None:
            raise UserError(f"{key}: {reference}: no module named {module!r} in {here}")
        if found.is_relative_to(here) and "site-packages" not in found.parts and found != root.resolve():
            raise UserError(
                f"{key}: {reference}: {module} lies in {found}, and the job looks for it in the top of what it gets, "
                f"{root.resolve()}; put it there, or give --working-dir {found}"
            )


def directory_of(module: str) -> Path | None:
    """The one on Python's path from which a module is imported."""
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return None
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).resolve()
    steps = module.count(".") + (2 if path.name == "__init__.py" else 1)
    return path.parents[steps - 1]


def trees_of(kind: str, loaded: Any) -> Iterator[dict[str, Any]]:
    """A config, and those of the files that it names."""
    yield loaded.model_dump(mode="json")
    for path in {"sweep": lambda: [loaded.run], "pipeline": lambda: loaded.train}.get(kind, list)():
        yield from trees_of(*load_any(path))


def own_code_in(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, module:NAME)"""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from own_code_in(value, f"{prefix}{key}.")
        elif key in KEYS:
            names = value if isinstance(value, list) else [value]
            yield from ((f"{prefix}{key}", name) for name in names if isinstance(name, str) and is_plugin(name))
