"""A whole cluster looked at: each node as the doctor sees a machine, all of them against each other, and the links."""

import contextlib
import logging
import os
import secrets
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from ftray.cluster.probe import MAX_CLOCK_DIFFERENCE_S, ask_nodes
from ftray.cluster.resources import pinned_to
from ftray.doctor.bandwidth import CONNECT_S, Peer, judge_links, rounds
from ftray.doctor.checks import Finding, judge
from ftray.doctor.machine import Machine, look, wandb_server
from ftray.errors import UserError
from ftray.storage.objects import first_line
from ftray.submit.jobs import TOKEN_FIX

OF_GPUS = ("driver", "torch's CUDA", "NCCL", "number of GPUs")
ACTOR_S = 60.0  # for an actor to come up, or a link to be measured


def examine_cluster(address: str, *, shared: Path | None, log: Callable[[str], None]) -> list[Finding]:
    """`shared`: a directory that all nodes should see."""
    with connected(address) as problem:
        if problem is not None:
            return [problem]
        nodes = [node for node in ray.nodes() if node["Alive"]]
        log(f"asks {len(nodes)} nodes")
        token = secrets.token_hex(8)
        probe = shared / f".ftray-doctor-{token}" if shared is not None else None
        try:
            if probe is not None:
                probe.write_text(token)
            asked = time.time()
            answers = ask_nodes(nodes, look_there, probe, wandb_server())
            answered = time.time()
        except OSError as error:
            return [Finding("failed", "shared storage", f"{shared}: {error.strerror}", "give a directory of all nodes")]
        finally:
            if probe is not None:
                probe.unlink(missing_ok=True)
        findings = describe_cluster(address, ray.nodes())
        machines = {}
        for node, answer in zip(nodes, answers, strict=True):
            if isinstance(answer, UserError):
                fix = "install ftray there, the same version (cluster/constraints.txt)"
                findings.append(Finding("failed", "node", str(answer), fix, node["NodeManagerAddress"]))
            else:
                machines[name_of(node)] = answer
        findings += compare(machines, asked=asked, answered=answered)
        findings += compare_storage(machines, shared, token)
        for name, machine in machines.items():
            findings += [replace(found, node=name) for found in judge(machine)]
        log("measures the links")
        return findings + judge_links(measure_links([node for node in nodes if name_of(node) in machines]))


@contextlib.contextmanager
def connected(address: str) -> Iterator[Finding | None]:
    """Yields what is wrong where the cluster cannot be joined."""
    fix = "start it (ray start --head), give --address HOST:6379 of its head, or unset RAY_ADDRESS"
    if address.startswith("http"):
        text = f"{address} is a job server; the doctor joins the cluster itself"
        fix = "ray job submit -- python -m ftray doctor, or --address HOST:6379 where the nodes are in reach"
        yield Finding("failed", "ray cluster", text, fix)
        return
    host, _, port = address.removeprefix("ray://").partition(":")
    try:
        if address != "auto":
            socket.create_connection((host, int(port or 6379)), timeout=CONNECT_S).close()  # Ray would wait longer
            fix = f"something listens there; if it is Ray, it has another token: {TOKEN_FIX}"  # Ray does not say so
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except (OSError, RuntimeError, ValueError, RayError) as error:
        if "token" in str(error).lower() or "auth" in str(error).lower():
            fix = TOKEN_FIX
        yield Finding("failed", "ray cluster", f"{address}: {first_line(error)}", fix)
        return
    try:
        yield None
    finally:
        ray.shutdown()


def look_there(address: str, probe: Path | None, wandb: str | None) -> Machine:
    return look(probe, wandb=wandb)


def name_of(node: dict[str, Any]) -> str:
    return node["NodeManagerAddress"]


def describe_cluster(address: str, nodes: list[dict[str, Any]]) -> list[Finding]:
    alive = [node for node in nodes if node["Alive"]]
    gone = [name_of(node) for node in nodes if not node["Alive"] and name_of(node) not in map(name_of, alive)]
    have = Counter[str]()
    for node in alive:
        have.update({kind: int(node["Resources"].get(kind, 0)) for kind in ("CPU", "GPU")})
    text = f"{address}: {len(alive)} nodes with {have['CPU']} CPUs and {have['GPU']} GPUs for Ray"
    findings = [Finding("ok", "ray cluster", text)]
    if gone:
        fix = "a spot machine that was taken is normal; else look at its kernel log and Ray's logs"
        findings.append(Finding("warning", "ray cluster", f"nodes that died: {', '.join(gone)}", fix))
    return findings


def compare(machines: dict[str, Machine], *, asked: float, answered: float) -> list[Finding]:
    """`asked`, `answered`: this machine's clock before and after every node looked at its own."""
    findings = []
    for what, of in (
        ("python", lambda machine: machine.python),
        *((name, lambda machine, name=name: machine.packages[name]) for name in packages_of(machines)),
        ("torch's CUDA", lambda machine: machine.cuda),
        ("NCCL", lambda machine: machine.nccl),
        ("driver", lambda machine: machine.gpus[0].driver if machine.gpus else None),
        ("number of GPUs", lambda machine: str(len(machine.gpus)) if machine.gpus else None),
    ):
        findings += differing(what, {name: of(machine) for name, machine in machines.items()})
    for name, machine in machines.items():
        if not asked - MAX_CLOCK_DIFFERENCE_S < machine.clock < answered + MAX_CLOCK_DIFFERENCE_S:
            text = f"differs by {machine.clock - answered:.0f} s from this machine's"
            findings.append(Finding("failed", "clock", text, "synchronise it (chrony, NTP)", name))
        if not machine.token_auth:
            text = "asks for no token: whoever reaches its ports runs code there"
            fix = "RAY_AUTH_MODE=token on every node, with one token (~/.ray/auth_token)"
            findings.append(Finding("failed", "ray auth", text, fix, name))
    if not findings:
        findings.append(Finding("ok", "nodes", f"{len(machines)} with equal versions and clocks, closed by a token"))
    return findings


def packages_of(machines: dict[str, Machine]) -> list[str]:
    return sorted({name for machine in machines.values() for name in machine.packages})


def differing(what: str, values: dict[str, str | None]) -> list[Finding]:
    """The nodes that are not as most are; a node that has none of it (no GPU) is not asked."""
    asked = {name: value for name, value in values.items() if value is not None or what not in OF_GPUS}
    if len(set(asked.values())) < 2:
        return []
    (usual, count), *_ = Counter(asked.values()).most_common()
    return [
        Finding(
            "failed",
            what,
            f"{value or 'not installed'}, {count} of {len(asked)} nodes have {usual or 'none'}",
            "install the same everywhere (cluster/constraints.txt)",
            name,
        )
        for name, value in asked.items()
        if value != usual
    ]


def compare_storage(machines: dict[str, Machine], shared: Path | None, token: str) -> list[Finding]:
    if shared is None:
        text = "not looked at: --shared DIRECTORY tries it"
        return [Finding("ok", "shared storage", text)]
    blind = [name for name, machine in machines.items() if machine.shared != token]
    if blind:
        fix = "mount it on every node, at the same path"
        return [Finding("failed", "shared storage", f"{shared} is not seen there", fix, name) for name in blind]
    return [Finding("ok", "shared storage", f"{shared}: all nodes see a file as soon as it is written")]


def measure_links(nodes: list[dict[str, Any]]) -> dict[tuple[str, str], float | str]:
    """Of every (from, to): bytes a second, or why not. A node that fails meanwhile is told as its links."""
    if len(nodes) < 2:
        return {}
    nonce, actor = os.urandom(16), ray.remote(num_cpus=0)(Peer)
    peers: list[Any] = [
        actor.options(scheduling_strategy=pinned_to(node["NodeID"])).remote(name_of(node), nonce) for node in nodes
    ]
    names = [name_of(node) for node in nodes]
    ports = answers_of([peer.port.remote() for peer in peers])
    rates: dict[tuple[str, str], float | str] = {}
    for pairs in rounds(len(nodes)):
        open_pairs = [(a, b) for a, b in pairs if isinstance(ports[a], int) and isinstance(ports[b], int)]
        for a, b in set(pairs) - set(open_pairs):
            rates[names[a], names[b]] = next(port for port in (ports[a], ports[b]) if isinstance(port, str))
        sent = answers_of([peers[a].send.remote(names[b], ports[b]) for a, b in open_pairs])
        rates |= {(names[a], names[b]): rate for (a, b), rate in zip(open_pairs, sent, strict=True)}
    return rates


def answers_of(tasks: list[Any]) -> list[Any]:
    """Each task's result, or as text why it has none."""
    ready, _ = ray.wait(tasks, num_returns=len(tasks), timeout=ACTOR_S) if tasks else ([], [])
    found = []
    for task in tasks:
        try:
            found.append(ray.get(task) if task in ready else f"no answer within {ACTOR_S:.0f} s")
        except RayError as error:
            found.append(first_line(error))
    return found
