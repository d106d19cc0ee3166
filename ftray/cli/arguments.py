"""Arguments that several commands share."""

from typing import Annotated

import typer

ConfigFile = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Settings that replace those of the file.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the resolved config and what would run, then stop.")]
RegistryOption = Annotated[str, typer.Option("--registry", help="A directory or URL (s3://...).")]
