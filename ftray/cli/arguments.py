"""Arguments that several commands share."""

import sys
from typing import Annotated

import typer

from ftray.errors import UserError
from ftray.schema import expanded

ConfigFile = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Settings that replace those of the file.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show the resolved config and what would run, refuse what cannot, then stop.")
]


def place(given: str | None) -> str | None:
    """`~` where a shell has left it, as in quotes."""
    try:
        return expanded(given) if given is not None else None
    except ValueError as error:
        raise UserError(f"{given}: {error}") from None


def confirmed(question: str, *, otherwise: str) -> bool:
    """Asks at the terminal. Raises `UserError` where there is none: --yes is given `otherwise` (to delete it)."""
    if not sys.stdin.isatty():
        raise UserError(f"--yes: there is no terminal to ask at; give it {otherwise}")
    return typer.confirm(question)


RegistryOption = Annotated[
    str, typer.Option("--registry", help="A directory or URL (s3://...).", callback=place, metavar="PLACE")
]
