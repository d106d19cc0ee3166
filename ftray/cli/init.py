"""`ftray init`."""

import shutil
from pathlib import Path
from typing import Annotated

import typer

from ftray.config.editor import SCHEMAS
from ftray.errors import UserError

STARTER = Path(__file__).parent / "starter"
NAMES = {"gitignore": ".gitignore"}  # a package would leave the hidden file out


def init(
    directory: Annotated[str, typer.Argument(metavar="DIRECTORY", help="Where to; it may hold other files.")] = ".",
) -> None:
    """Write a starter project: configs of each kind, sample data, and schemas for editors."""
    root = Path(directory)
    files = {root / target_of(path): path for path in sorted(STARTER.rglob("*")) if path.is_file()}
    files |= {root / ".ftray" / path.name: path for path in sorted(SCHEMAS.glob("*.json"))}
    if taken := [path for path in files if path.exists()]:
        raise UserError(f"{taken[0]} is there already, and nothing was written; choose another directory")
    for path, source in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, path)
        print(f"  {path}")
    enter = "" if root.resolve() == Path.cwd() else f"cd {directory}; "
    print(f"next: {enter}ftray train run.yaml")


def target_of(path: Path) -> Path:
    relative = path.relative_to(STARTER)
    return relative.with_name(NAMES.get(relative.name, relative.name))
