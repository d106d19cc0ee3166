"""Each thing that can be wrong with a machine or a cluster, broken, and named."""

import contextlib
import json
import os
import socket
import threading
from dataclasses import replace

import pytest
import typer

from ftray.cli.doctor import doctor
from ftray.doctor import bases
from ftray.doctor.bandwidth import Peer, judge_links, rounds
from ftray.doctor.checks import CONSTRAINTS, PINNED, examine, judge
from ftray.doctor.machine import Gpu, Interface, Machine, Room, look, parse_gpus
from ftray.doctor.nodes import compare, compare_storage, describe_cluster, examine_cluster
from ftray.errors import UserError
from ftray.model.proof import refuse

PINS = dict(line.split("==") for line in CONSTRAINTS.read_text().split() if "==" in line)
PACKAGES = {name: PINS[name] for name in PINNED}
H100 = Gpu("NVIDIA H100 80GB HBM3", 79.6, "580.95.05")
GOOD = Machine(
    host="a",
    python="3.11.9",
    packages=PACKAGES,
    clock=1000.0,
    cpus=96,
    memory_gib=1000.0,
    free_memory_gib=900.0,
    rooms={"cache disk": Room("/home/u/.cache", 800.0, True), "ray disk": Room("/tmp", 800.0, True)},
    shm_gib=300.0,
    shm_used=0.1,
    open_files=65536,
    locked_memory_gib=float("inf"),
    gpus=(H100,) * 8,
    gpu_problem=None,
    cuda="13.0",
    nccl="2.29.7",
    fabrics=("mlx5_0",),
    interfaces=(Interface("eth0", "10.0.0.1", 100_000),),
    token_auth=True,
    wandb_problem=None,
    shared="token",
)


def broken(findings) -> list:
    return [finding for finding in findings if finding.level != "ok"]


def test_a_good_machine_has_nothing_wrong():
    assert broken(judge(GOOD)) == []


@pytest.mark.parametrize(
    ("changes", "level", "subject", "says"),
    [
        ({"python": "3.9.2"}, "failed", "python", "3.9.2 is not supported"),
        ({"packages": PACKAGES | {"peft": None}}, "failed", "peft", "not installed"),
        ({"packages": PACKAGES | {"ray": "2.9.0"}}, "warning", "ray", "2.9.0, tested with"),
        ({"cuda": None}, "failed", "gpus", "built without CUDA"),
        ({"nccl": None}, "failed", "gpus", "built without NCCL"),
        ({"gpus": (replace(H100, driver="550.54"),)}, "failed", "gpus", "too old for torch's CUDA 13.0"),
        ({"gpus": (), "gpu_problem": "NVIDIA-SMI has failed"}, "failed", "gpus", "NVIDIA-SMI has failed"),
        ({"gpus": (H100, Gpu("NVIDIA A100", 79.6, "580.95"))}, "warning", "gpus", "A100"),
        ({"free_memory_gib": 2.0}, "warning", "memory", "2.0 of 1000.0 GiB free"),
        ({"rooms": {"ray disk": Room("/tmp", 0.5, True)}}, "failed", "ray disk", "0.5 GiB free at /tmp"),
        ({"rooms": {"cache disk": Room("/c", 50.0, False)}}, "failed", "cache disk", "/c cannot be written"),
        ({"shm_gib": 0.0625}, "failed", "/dev/shm", "too small"),
        ({"shm_used": 0.97}, "failed", "/dev/shm", "97% used"),
        ({"open_files": 1024}, "warning", "ulimit", "1024 open files"),
        ({"locked_memory_gib": 8 / 1024}, "failed", "ulimit", "RDMA needs more"),
        ({"interfaces": ()}, "warning", "network", "loopback"),
    ],
)
def test_what_is_wrong_with_a_machine_is_named(changes, level, subject, says):
    (found,) = broken(judge(replace(GOOD, **changes)))
    assert (found.level, found.subject) == (level, subject)
    assert says in found.text
    assert found.fix


def test_memory_may_be_locked_a_little_where_there_is_no_rdma():
    assert broken(judge(replace(GOOD, fabrics=(), locked_memory_gib=0.008))) == []


@pytest.mark.parametrize(
    ("changes", "subject", "says"),
    [
        ({"python": "3.11.2"}, "python", "3.11.2, 2 of 3 nodes have 3.11.9"),
        ({"packages": PACKAGES | {"torch": "2.12.0"}}, "torch", "2.12.0, 2 of 3 nodes have"),
        ({"cuda": "12.8"}, "torch's CUDA", "12.8, 2 of 3"),
        ({"gpus": (replace(H100, driver="570.1"),) * 8}, "driver", "570.1"),
        ({"nccl": "2.20.5"}, "NCCL", "2.20.5"),
        ({"gpus": (H100,) * 7}, "number of GPUs", "7, 2 of 3 nodes have 8"),
        ({"clock": 900.0}, "clock", "differs by -101 s"),
        ({"token_auth": False}, "ray auth", "whoever reaches its ports runs code there"),
    ],
)
def test_the_node_that_differs_is_named(changes, subject, says):
    machines = {"10.0.0.1": GOOD, "10.0.0.2": replace(GOOD, **changes), "10.0.0.3": GOOD}
    (found,) = broken(compare(machines, asked=999.0, answered=1001.0))
    assert (found.level, found.subject, found.node) == ("failed", subject, "10.0.0.2")
    assert says in found.text


def test_nodes_without_gpus_are_not_compared_by_driver():
    machines = {"head": replace(GOOD, gpus=(), cuda=None), "10.0.0.2": GOOD}
    assert broken(compare(machines, asked=999.0, answered=1001.0)) == []


def test_storage_that_a_node_does_not_see(tmp_path):
    machines = {"10.0.0.1": GOOD, "10.0.0.2": replace(GOOD, shared=None)}
    (found,) = compare_storage(machines, tmp_path, "token")
    assert (found.level, found.node) == ("failed", "10.0.0.2")
    assert compare_storage({"10.0.0.1": GOOD}, tmp_path, "token")[0].level == "ok"
    assert compare_storage(machines, None, "token")[0].level == "ok"


def test_nodes_that_died_are_told():
    def node(address: str, *, alive: bool) -> dict:
        return {"NodeManagerAddress": address, "Alive": alive, "Resources": {"CPU": 4.0, "GPU": 8.0}}

    nodes = [node("10.0.0.1", alive=True), node("10.0.0.2", alive=False), node("10.0.0.1", alive=False)]
    ok, gone = describe_cluster("10.0.0.1:6379", nodes)
    assert "1 nodes with 4 CPUs and 8 GPUs" in ok.text
    assert gone.text == "nodes that died: 10.0.0.2", "10.0.0.1 came back"


def test_the_gpus_of_nvidia_smi():
    listed = "NVIDIA H100 80GB HBM3, 81559, 580.95.05\nNVIDIA H100 80GB HBM3, 81559, 580.95.05\n"
    assert len(parse_gpus(listed)) == 2
    assert parse_gpus(listed)[0].driver == "580.95.05"
    assert parse_gpus("No devices were found\n") == ()
    assert parse_gpus("NVIDIA GB10, [N/A], 580.95.05\n")[0].memory_gib == 0.0


# -- links -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 4, 7, 8])
def test_every_link_is_measured_once_and_no_machine_twice_at_a_time(count):
    seen = []
    for pairs in rounds(count):
        machines = [machine for pair in pairs for machine in pair]
        assert len(machines) == len(set(machines))
        seen += pairs
    assert sorted(seen) == [(a, b) for a in range(count) for b in range(count) if a != b]


def test_links_that_are_slow_or_closed_are_named():
    rates: dict = {("a", "b"): 1.2e9, ("b", "a"): 1.2e9, ("a", "c"): 1.1e9, ("c", "a"): 0.1e9, ("b", "c"): "timed out"}
    closed, slow, ok = judge_links(rates)
    assert (closed.level, closed.text) == ("failed", "b does not reach c: timed out")
    assert (slow.level, slow.text) == ("warning", "c -> a: 0.8 Gbit/s, the median is 9.2 Gbit/s")
    assert "slowest 0.8 Gbit/s (c -> a)" in ok.text


def test_bytes_are_counted_where_they_arrive():
    nonce = os.urandom(16)
    here, there = Peer("127.0.0.1", nonce), Peer("127.0.0.1", nonce)
    rate = here.send("127.0.0.1", there.port())
    assert isinstance(rate, float)
    assert rate > 1e6
    stranger = Peer("127.0.0.1", os.urandom(16))
    assert isinstance(stranger.send("127.0.0.1", there.port()), str)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    assert "refused" in str(here.send("127.0.0.1", port))


# -- this machine ----------------------------------------------------------------------------------------------------


def test_this_machine_is_looked_at():
    machine = look()
    assert machine.memory_gib >= machine.free_memory_gib > 0
    assert machine.packages["ray"] == PINS["ray"]
    assert {"hardware", "disk", "port 8000", "wandb server", "/dev/shm"} <= {finding.subject for finding in examine()}


def test_wandb_that_is_not_reached(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    (found,) = [finding for finding in examine() if finding.subject == "wandb server"]
    assert (found.level, "http://127.0.0.1:9 is not reached" in found.text) == ("warning", True)
    there = judge(replace(GOOD, wandb_problem="ConnectTimeout"))  # from a node
    assert [(found.level, found.subject) for found in broken(there)] == [("warning", "wandb server")]
    assert broken(judge(GOOD)) == []


def test_a_port_that_is_taken(monkeypatch):
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind(("127.0.0.1", 8000))
        except OSError:
            pass  # by another program: as good
        else:
            taken.listen()
            threading.Thread(target=taken.accept, daemon=True).start()
        (found,) = [finding for finding in examine() if finding.subject == "port 8000"]
    assert found.level == "warning"
    assert "port=8001" in found.fix


def test_storage_is_shared_by_several(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UserError, match="--shared: one machine"):
        doctor(None, "/shared", False)


def test_a_job_server_is_no_cluster_to_join():
    (found,) = examine_cluster("http://127.0.0.1:8265", shared=None, log=print)
    assert found.level == "failed"
    assert "ray job submit" in found.fix


def test_json_is_for_machines(capsys):
    with contextlib.suppress(typer.Exit):
        doctor(None, None, True)
    findings = json.loads(capsys.readouterr().out)
    assert set(findings[0]) == {"level", "subject", "text", "fix", "node"}


def test_a_base_model_is_looked_at(tiny_model, capsys):
    doctor(base=str(tiny_model))
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert [level for level, _ in lines] == ["ok"] * 5
    assert "llama" in lines[0][1]
    assert lines[1][1] == "all-linear     q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
    with pytest.raises(UserError, match="--base: a base model is looked at on this machine"):
        doctor(base=str(tiny_model), address="h:1")


def test_a_base_model_that_is_computed_wrongly_fails(tiny_base):
    def wrong(base):
        refuse(base, "rows differ; ftray does", what="training")

    finding = bases.proof(tiny_base, "training", wrong)
    assert (finding.level, finding.text) == ("failed", "rows differ; ftray does")
