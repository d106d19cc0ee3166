"""Arguments that several commands share."""

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


RegistryOption = Annotated[
    str, typer.Option("--registry", help="A directory or URL (s3://...).", callback=place, metavar="PLACE")
]
