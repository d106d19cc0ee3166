"""`ftray clean`"""

from pathlib import Path
from typing import Annotated

import typer

from ftray.cli.arguments import confirmed, place


def clean(
    runs_dir: Annotated[
        str, typer.Option("--runs-dir", help="Whose kept tokens are looked at.", callback=place)
    ] = "runs",
    older_than: Annotated[
        float, typer.Option("--older-than", min=0, metavar="DAYS", help="What was used since then stays.")
    ] = 7.0,
    yes: Annotated[bool, typer.Option("--yes", help="Remove without asking.")] = False,
) -> None:
    """Show what runs have left that nobody needs (directories of Ray sessions that have ended, tokens of data sets),
    and remove it. Runs, checkpoints and adapters are never touched."""
    from ftray.cluster.leftovers import DAY_S, old_sessions, old_tokens, remove
    from ftray.storage.local_copies import describe_bytes

    oldest_s = older_than * DAY_S
    found = [*old_sessions(older_than_s=oldest_s), *old_tokens(Path(runs_dir), older_than_s=oldest_s)]
    if not found:
        print(f"nothing is older than {older_than:g} days")
        return
    for leftover in found:
        age = f"{leftover.age_s / DAY_S:.0f} days" if leftover.age_s >= DAY_S else f"{leftover.age_s / 3600:.0f} hours"
        print(f"{leftover.kind:<14} {describe_bytes(leftover.num_bytes):>10}  {age:>9}  {leftover.path}")
    total = f"{len(found)} of them, {describe_bytes(sum(leftover.num_bytes for leftover in found))}"
    if not yes and not confirmed(f"{total}: remove them?", otherwise=f"to remove them ({total})"):
        return
    kept = [leftover for leftover in found if not remove(leftover)]
    print(f"removed: {total}" + (f"; {len(kept)} are in use and stay" if kept else ""))
