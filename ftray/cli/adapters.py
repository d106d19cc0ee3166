"""`ftray adapters`"""

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from ftray.cli import rollout
from ftray.cli.arguments import RegistryOption, place
from ftray.errors import DamagedError, UserError

app = typer.Typer(help="The registry of adapters: numbered versions that never change, and aliases that move.")


@app.command("list")
def list_adapters(registry: RegistryOption = "registry") -> None:
    """Every adapter with its versions and aliases."""
    from ftray.registry import Registry

    store = Registry(registry)
    if not store.names():
        print(f"{registry} has no adapters; `ftray adapters publish DIR --name NAME` adds one")
    for name in store.names():
        aliases = store.aliases(name)
        for number in store.versions(name):
            pointing = [alias for alias, target in aliases.items() if target == number]
            pointing += [f"{c.percent:g}% of {a}" for a, c in store.canaries(name).items() if c.number == number]
            pointing += [f"#{tag}" for tag in store.tags(name, number)]
            try:
                metadata = store.get(f"{name}@{number}").metadata
            except DamagedError as error:
                print(f"{name}@{number:<4} damaged: {error}  {', '.join(pointing)}".rstrip())
                continue
            when = time.strftime("%Y-%m-%d %H:%M", time.localtime(metadata["published_at"]))
            base = f"rank {metadata.get('rank')}  {metadata.get('base_model')}"
            print(f"{name}@{number:<4} {when}  {base}  {', '.join(pointing)}".rstrip())


@app.command()
def show(reference: str, registry: RegistryOption = "registry") -> None:
    """One version as JSON: its files, base model, metrics, and the history of its name."""
    from ftray.registry import Registry

    store = Registry(registry)
    version = store.get(reference)
    described = {
        "version": str(version),
        "tags": store.tags(version.name, version.number),
        **version.manifest.model_dump(),
        "history": store.history(version.name),
    }
    print(json.dumps(described, indent=2))


@app.command()
def verify(
    registry: RegistryOption = "registry",
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Make the journal anew from the versions that are there.")
    ] = False,
) -> None:
    """Look at everything: the journal's entries as a chain, and each version's files byte for byte."""
    from ftray.registry.verify import rebuild_journal, verify_registry
    from ftray.storage import ObjectStore

    if not ObjectStore(registry).exists:
        raise UserError(f"{registry}: there is no registry")
    if rebuild:
        journal = rebuild_journal(registry)
        print(f"the journal is made anew: {journal.last_seq} entries; the old one is kept as journal-before-...")
        for (name, alias), number in sorted(journal.aliases.items()):
            print(f"  {name}@{alias} is {name}@{number}")
        print("look at the aliases: moves after the damage are lost; start endpoints again, they know the old journal")
    found = verify_registry(registry)
    print(f"{registry}: {found.entries} entries, {found.versions} versions")
    for problem in found.problems:
        print(f"  - {problem}")
    if found.problems:
        count = len(found.problems)
        raise DamagedError(f"{registry}: {count} problem{'s' if count != 1 else ''}")
    print("all whole")


@app.command()
def publish(
    directory: Annotated[str, typer.Argument(help="A PEFT directory, such as runs/NAME/adapter or s3://...")],
    name: Annotated[
        str | None,
        typer.Option("--name", help="The adapter's name, else its run's; the registry chooses the version number."),
    ] = None,
    registry: RegistryOption = "registry",
) -> None:
    """Copy an adapter in as the next version of NAME."""
    from ftray.registry.reference import parse_reference

    if name is None:
        name = run_of(directory)
    parse_reference(name)
    from ftray.artifacts.publish import publish_adapter
    from ftray.model.adapters.directory import local_adapter
    from ftray.registry import Registry

    version = publish_adapter(Registry(registry), name, local_adapter(directory) or Path(directory))
    flag = "" if registry == "registry" else f" --registry {registry}"
    print(f"published {version} in {registry}")
    print(f"next: ftray adapters promote {version} prod{flag}")


def run_of(directory: str) -> str:
    """The run whose adapter it is, by its config."""
    from ftray.storage import read_json

    config = Path(directory).absolute().parent / "config.json"
    if "://" in directory or not config.is_file():
        raise UserError(f"--name: {directory} is no run's adapter, so no name is known; give one with --name NAME")
    return str(read_json(config)["name"])


@app.command()
def merge(
    reference: Annotated[
        str, typer.Argument(metavar="NAME@N|DIR", help="A version, an alias, or a PEFT directory, also s3://...")
    ],
    output: Annotated[str, typer.Option("--output", help="Where the merged model is written.", callback=place)],
    base_model: Annotated[
        str | None, typer.Option("--base", help="The base; without it the one that the adapter names.")
    ] = None,
    registry: RegistryOption = "registry",
) -> None:
    """Add an adapter into its base for good: a model directory to train on or to serve."""
    from ftray.model.adapters.directory import check_base, local_adapter, read_adapter_config
    from ftray.model.adapters.merge import merge_adapter
    from ftray.model.base import chat_in, prepare_base
    from ftray.registry import Registry
    from ftray.storage import verify_directory
    from ftray.storage.manifest import MANIFEST

    if (directory := local_adapter(reference)) is not None:
        label = reference
        metadata = verify_directory(directory).metadata if (directory / MANIFEST).is_file() else {}
    else:
        store = Registry(registry)
        version = store.get(reference)
        directory, label, metadata = store.directory(version), str(version), version.metadata
    named = base_model or metadata.get("base_model")
    named = named or read_adapter_config(directory, label=label).get("base_model_name_or_path")
    if named is None:
        raise UserError(f"{label} does not name its base; give it with --base")
    base = prepare_base(named, chat=chat_in(metadata), log=print)
    check_base(label, metadata, base, here="--base is")
    merge_adapter(directory, base, Path(output), label=label)
    print(f"{label} is merged into {base.name}: {output}")
    print(f"next: base_model={output} in a run or serve config")


for command in (rollout.promote, rollout.rollback, rollout.canary, rollout.delete, rollout.card):
    app.command()(command)
app.command(context_settings={"ignore_unknown_options": True})(rollout.tag)  # a leading '-' takes a tag away
