"""`ftray doctor`"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ftray.errors import UserError

if TYPE_CHECKING:
    from ftray.doctor.checks import Finding


def doctor(
    address: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Of a cluster. Default: RAY_ADDRESS; else this machine.")
    ] = None,
    shared: Annotated[
        str | None, typer.Option(metavar="DIRECTORY", help="Do all nodes of the cluster see this directory?")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines: a list of findings.")] = False,
    base: Annotated[
        str | None, typer.Option(metavar="NAME", help="A base model instead: is it trained and served right?")
    ] = None,
) -> None:
    """What is wrong with this machine, or with every node of a cluster, and the fix. On a cluster without a login:
    ray job submit -- python -m ftray doctor."""
    from ftray.doctor.checks import examine

    if base is not None and (address or shared):
        raise UserError("--base: a base model is looked at on this machine; leave --address and --shared out")
    cluster = None if base is not None else address or os.environ.get("RAY_ADDRESS")
    if cluster is None and shared is not None:
        raise UserError("--shared: one machine has nothing to share; name a cluster with --address or RAY_ADDRESS")
    if base is not None:
        from ftray.doctor.bases import examine_base

        findings = examine_base(base, log=lambda text: print(f"  {text}", file=sys.stderr, flush=True))
    elif cluster is None:
        findings = examine()
    else:
        from ftray.doctor.nodes import examine_cluster

        findings = examine_cluster(
            cluster,
            shared=Path(shared).absolute() if shared is not None else None,
            log=lambda text: print(f"  {text}", file=sys.stderr, flush=True),
        )
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        show(findings)
    if any(finding.level == "failed" for finding in findings):
        raise typer.Exit(1)


def show(findings: "list[Finding]") -> None:
    """What is right on a node of a cluster is one line."""
    for node in dict.fromkeys(finding.node for finding in findings):
        of_node = [finding for finding in findings if finding.node == node]
        right = [finding for finding in of_node if finding.level == "ok"] if node else []
        if node:
            print(f"\nnode {node}")
        if right:
            print(f"{'ok':<8} {', '.join(dict.fromkeys(finding.subject for finding in right))}")
        for finding in of_node:
            if finding not in right:
                print(f"{finding.level:<8} {finding.subject:<14} {finding.text}")
                if finding.fix:
                    print(f"{'':<23} fix: {finding.fix}")
