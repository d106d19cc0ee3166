"""`ftray tenants` and `ftray usage`"""

import csv
import datetime
import sys
from typing import Annotated, Any

import typer

from ftray.cli.arguments import place
from ftray.errors import UserError

app = typer.Typer(help="Who may use an endpoint (kind: serve, tenants.database), and how much.")

Database = Annotated[
    str, typer.Option("--database", help="A file (SQLite), or postgresql://USER@HOST/NAME.", callback=place)
]
Name = Annotated[str, typer.Argument(metavar="TENANT")]
Adapters = Annotated[
    str | None,
    typer.Option(help="Names of the adapters it may use, with commas; 'all' for every one. Without it the base alone."),
]
RequestRate = Annotated[int | None, typer.Option(help="0: no limit.")]
TokenRate = Annotated[int | None, typer.Option(help="Of prompts and answers; 0: no limit.")]
Budget = Annotated[int | None, typer.Option(help="Tokens in all; 0: no limit.")]
Priority = Annotated[float | None, typer.Option(help="Its share of a busy engine, against 1 of others.")]

DATABASE = "tenants.db"


def settings(
    adapters: str | None,
    requests_per_minute: int | None,
    tokens_per_minute: int | None,
    budget_tokens: int | None,
    priority: float | None,
) -> dict[str, Any]:
    """Those that were given."""
    given: dict[str, Any] = {}
    if adapters is not None:
        given["adapters"] = None if adapters == "all" else tuple(name for name in adapters.split(",") if name)
    limits = {
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "budget_tokens": budget_tokens,
    }
    given |= {name: value or None for name, value in limits.items() if value is not None}
    return given | ({"priority": priority} if priority is not None else {})


@app.command()
def create(
    name: Name,
    database: Database = DATABASE,
    adapters: Adapters = None,
    requests_per_minute: RequestRate = None,
    tokens_per_minute: TokenRate = None,
    budget_tokens: Budget = None,
    priority: Priority = None,
    admin: Annotated[
        bool, typer.Option("--admin", help="Its key may also warm adapters and look into the endpoint.")
    ] = False,
) -> None:
    """Add a tenant and print its first key. The key is shown only now; of it only a hash is kept."""
    from ftray.serve.tenants.accounts import Accounts, Tenant

    given = settings(adapters, requests_per_minute, tokens_per_minute, budget_tokens, priority)
    tenant = Tenant(name, is_admin=admin, **{"adapters": (), **given})
    key = Accounts(database).create(tenant)
    print(f"{described(tenant)}; at endpoints with tenants.database: {database}", file=sys.stderr)
    if not tenant.adapters and adapters is None:
        print(f"adapters: `ftray tenants set {name} --adapters NAME,NAME` (or all)", file=sys.stderr)
    print("its key, which is not shown again:", file=sys.stderr)
    print(key)


@app.command("set")
def change(
    name: Name,
    database: Database = DATABASE,
    adapters: Adapters = None,
    requests_per_minute: RequestRate = None,
    tokens_per_minute: TokenRate = None,
    budget_tokens: Budget = None,
    priority: Priority = None,
) -> None:
    """Change a tenant's limits; running endpoints follow within seconds."""
    from ftray.serve.tenants.accounts import Accounts

    given = settings(adapters, requests_per_minute, tokens_per_minute, budget_tokens, priority)
    if not given:
        raise UserError("nothing to change; see `ftray tenants set --help`")
    print(described(Accounts(database, create=False).change(name, given)))


@app.command("list")
def list_tenants(database: Database = DATABASE) -> None:
    """Every tenant with its limits and keys (their last four characters)."""
    from ftray.serve.tenants.accounts import Accounts

    accounts = Accounts(database, create=False)
    if not accounts.tenants():
        print(f"{database} has no tenants; `ftray tenants create NAME` adds one")
    for tenant in accounts.tenants():
        print(described(tenant))
        for key in accounts.keys(tenant.name):
            until = f" until {when(key['ends_at'])}" if key["ends_at"] is not None else ""
            print(f"  key ...{key['hint']} since {when(key['created_at'])}{until}")


@app.command()
def rotate(
    name: Name,
    database: Database = DATABASE,
    grace: Annotated[float, typer.Option("--grace", help="Hours for which the old keys go on working.")] = 24.0,
) -> None:
    """Print a new key; the tenant's other keys end after a grace."""
    from ftray.serve.tenants.accounts import Accounts

    key = Accounts(database, create=False).rotate(name, grace_s=grace * 3600)
    print(f"{name}: its other keys end in {grace:g} hours; the new key, which is not shown again:", file=sys.stderr)
    print(key)


@app.command()
def revoke(
    name: Name,
    database: Database = DATABASE,
    key: Annotated[str | None, typer.Option("--key", help="Only the key that ends in these four characters.")] = None,
) -> None:
    """End a tenant's keys at once."""
    from ftray.serve.tenants.accounts import Accounts

    ended = Accounts(database, create=False).revoke(name, hint=key)
    if not ended:
        raise UserError(f"{name}: no valid key{f' ends in {key}' if key else ''}; `ftray tenants list` shows them")
    print(f"{name}: {ended} key{'s' if ended != 1 else ''} ended")


def usage(
    database: Database = DATABASE,
    tenant: Annotated[str | None, typer.Option("--tenant")] = None,
    since: Annotated[datetime.datetime | None, typer.Option("--since", help="UTC, such as 2026-11-01.")] = None,
    until: Annotated[datetime.datetime | None, typer.Option("--until", help="UTC.")] = None,
    as_csv: Annotated[bool, typer.Option("--csv")] = False,
) -> None:
    """Requests and tokens by tenant and adapter version, as the endpoints have counted them."""
    from ftray.serve.tenants.accounts import Accounts

    rows = Accounts(database, create=False).usage(tenant=tenant, since=timestamp(since), until=timestamp(until))
    columns = (
        "tenant",
        "model",
        "requests",
        "cut",
        "prompt_tokens",
        "cached_tokens",
        "completion_tokens",
    )
    if as_csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerows([columns, *([row[name] for name in columns] for row in rows)])
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(*(name.replace("_", " ") for name in columns), box=None, title_justify="left")
    for row in rows:
        table.add_row(*(f"{value:,}" if isinstance(value, int) else str(value) for value in (row[c] for c in columns)))
    Console().print(table)


def described(tenant: Any) -> str:
    limits = {
        "requests/min": tenant.requests_per_minute,
        "tokens/min": tenant.tokens_per_minute,
        "tokens in all": tenant.budget_tokens,
    }
    reported = [f"{value:,} {name}" for name, value in limits.items() if value is not None]
    reported += [f"priority {tenant.priority:g}"] if tenant.priority != 1 else []
    reported += ["admin"] if tenant.is_admin else []
    adapters = "every adapter" if tenant.adapters is None else ", ".join(tenant.adapters) or "the base only"
    return f"{tenant.name}: {'; '.join([adapters, *reported])}"


def when(at: float) -> str:
    return datetime.datetime.fromtimestamp(at, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def timestamp(moment: datetime.datetime | None) -> float | None:
    return None if moment is None else moment.replace(tzinfo=datetime.UTC).timestamp()
