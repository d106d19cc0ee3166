"""`ftray adapters promote | rollback | canary | tag | delete | card`: what moves between versions."""

import os
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from ftray.cli.arguments import RegistryOption, confirmed
from ftray.errors import FtrayError, UserError

Reason = Annotated[str | None, typer.Option("--reason", help="Kept in the journal, beside who did it.")]
Force = Annotated[bool, typer.Option("--force", help="Without a look at its files and base.")]
WARM_TIMEOUT_S = 120.0
API_KEY = "FTRAY_API_KEY"
Version = Annotated[str, typer.Argument(metavar="NAME@N")]
Endpoint = Annotated[
    str | None, typer.Option("--endpoint", help=f"URL of a running endpoint; its admin key in {API_KEY}, if it asks.")
]


def promote(
    reference: Version,
    alias: str,
    registry: RegistryOption = "registry",
    expected: Annotated[
        int | None, typer.Option("--expected", help="Refuse if the alias does not stand at this version now.")
    ] = None,
    endpoint: Endpoint = None,
    reason: Reason = None,
    force: Force = False,
) -> None:
    """Point an alias at a version: requests for NAME@ALIAS are answered by it from then on. Its files are verified and
    it is loaded before the alias moves; with --endpoint every replica has loaded it."""
    from ftray.registry import Registry

    store = Registry(registry)
    exact = store.resolve(reference)
    if endpoint is not None:
        count = ask_endpoint(endpoint, "warm", {"model": str(exact)})["replicas"]
        print(f"{exact} is loaded on {count} replica{'s' if count != 1 else ''}")
    store.promote(str(exact), alias, expected=expected, reason=reason, force=force, loads=loads)
    print(f"{exact.name}@{alias} is {exact}")


def rollback(
    reference: Annotated[str, typer.Argument(metavar="NAME[@ALIAS]")],
    registry: RegistryOption = "registry",
    reason: Reason = None,
    force: Force = False,
) -> None:
    """Point an alias at the version it stood at before its last promotion; again, at the one before that."""
    from ftray.registry import Registry

    name, alias = alias_of(reference)
    left, now = Registry(registry).rollback(name, alias, reason=reason, force=force, loads=loads)
    print(f"{name}@{alias} is {now} again (was {left})")


def canary(
    reference: Annotated[str, typer.Argument(metavar="NAME@ALIAS")],
    share: Annotated[str, typer.Argument(metavar="N=PERCENT%|off", help="Such as 8=10%, or off.")],
    registry: RegistryOption = "registry",
    max_error_rate: Annotated[
        float,
        typer.Option(
            help="The endpoint takes the canary back above this share of failed answers, beyond those "
            "of the stable version."
        ),
    ] = 0.05,
    max_latency_ratio: Annotated[
        float, typer.Option(help="... or above this multiple of the stable version's median time to the first token.")
    ] = 2.0,
    min_requests: Annotated[int, typer.Option(help="... judged after so many of its requests.")] = 20,
    endpoint: Endpoint = None,
) -> None:
    """Send a share of an alias's requests to another version; one caller always gets the same one."""
    from ftray.registry import CanaryLimits, Registry

    name, alias = alias_of(reference)
    store = Registry(registry)
    if share == "off":
        ended = store.end_canary(name, alias, reason="taken back by hand")
        print(f"the canary {name}@{ended.number} of {name}@{alias} has ended")
        return
    found = re.fullmatch(r"(\d+)=(\d+(?:\.\d+)?)%", share)
    if found is None:
        raise UserError(f"{share!r}: give VERSION=PERCENT%, such as 8=10%, or off")
    exact = store.resolve(f"{name}@{found[1]}")
    if endpoint is not None:
        ask_endpoint(endpoint, "warm", {"model": str(exact)})
    limits = CanaryLimits(max_error_rate, max_latency_ratio, min_requests)
    store.set_canary(str(exact), alias, float(found[2]), limits, loads=loads)
    print(f"{exact} gets {float(found[2]):g}% of the requests for {name}@{alias}")


def tag(
    reference: Version,
    tags: Annotated[list[str], typer.Argument(metavar="TAG|-TAG...", help="A leading '-' takes a tag away.")],
    registry: RegistryOption = "registry",
) -> None:
    """Add tags to a version, or take them away."""
    from ftray.registry import Registry

    add = [tag for tag in tags if not tag.startswith("-")]
    now = Registry(registry).tag(reference, add=add, remove=[tag[1:] for tag in tags if tag.startswith("-")])
    print(f"{reference}: {', '.join(now) or 'no tags'}")


def delete(
    reference: Version,
    registry: RegistryOption = "registry",
    endpoint: Endpoint = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Aliases and canaries that stand on it go with it.")] = False,
) -> None:
    """Delete a version's files for good, damaged or whole. Refused while an alias or a canary stands on it; with
    --endpoint also while requests use it."""
    from ftray.registry import Registry

    store = Registry(registry)
    exact = store.resolve(reference)
    if str(exact) != reference:
        raise UserError(f"{reference}: name the version itself ({exact}) to delete it")
    if not force:
        store.refuse_used(exact)
    if not yes and not confirmed(f"delete {exact} for good?", otherwise=f"to delete {exact} for good"):
        raise typer.Abort
    if endpoint is not None:
        in_use = ask_endpoint(endpoint, "in_use", {"model": str(exact)})["requests"]
        if in_use:
            raise UserError(f"{exact}: {in_use} running requests use it; try again when they have ended")
    store.delete(str(exact), force=force)
    print(f"{exact} is deleted")


def card(reference: Version, registry: RegistryOption = "registry") -> None:
    """A version's model card, in Markdown: lineage, metrics, files."""
    from ftray.registry import Registry
    from ftray.registry.card import model_card

    store = Registry(registry)
    print(model_card(store, store.get(reference)), end="")


def loads(directory: Path) -> None:
    """A version, as an endpoint loads it. Raises `AdapterError`."""
    from ftray.model.adapters.weights import read_adapter

    read_adapter(directory, label=str(directory))


def alias_of(reference: str) -> tuple[str, str]:
    from ftray.registry import parse_reference

    parsed = parse_reference(reference)
    if parsed.alias is None:
        raise UserError(f"{reference}: name an alias, such as {parsed.name}@prod, not a version")
    return parsed.name, parsed.alias


def message_of(response: Any) -> str:
    try:
        return response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):  # of something in between, a proxy's page
        return f"status {response.status_code}: {response.text[:200]}"


def ask_endpoint(url: str, action: str, body: dict[str, Any]) -> dict[str, Any]:
    """One of the endpoint's own routes, for those who run it."""
    import httpx

    headers = {"Authorization": f"Bearer {os.environ[API_KEY]}"} if API_KEY in os.environ else {}
    address = f"{url.rstrip('/').removesuffix('/v1')}/ftray/{action}"
    try:
        response = httpx.post(address, json=body, headers=headers, timeout=WARM_TIMEOUT_S)
    except httpx.HTTPError as error:
        raise FtrayError(f"--endpoint: {address} does not answer: {error}") from None
    if response.status_code in (401, 403):
        raise UserError(f"--endpoint: {url} wants an admin key in the environment variable {API_KEY}")
    if response.status_code != 200:
        raise FtrayError(f"--endpoint: {message_of(response)}")
    return response.json()
