"""What the nodes of a cluster must agree on."""

import os
import shutil
import socket
import time
from pathlib import Path

import pytest
import torch.multiprocessing as multiprocessing
from tiny import write_tiny_model

from ftray.cluster.probe import NodeReport, compare_nodes
from ftray.cluster.resources import workers_that_fit
from ftray.config import parse_config
from ftray.errors import UserError
from ftray.model.base import prepare_base
from ftray.tracking.environment import describe_environment
from ftray.train.checkpoints.disk_space import check_disk, checkpoint_bytes

PACKAGES = describe_environment()["packages"]
GOOD = {"address": "10.0.0.2", "probe": "token", "packages": PACKAGES, "clock": 100.5}


def compare(**changes) -> None:
    reports = [NodeReport(**GOOD), NodeReport(**GOOD | changes)]
    compare_nodes(reports, "token", Path("/runs/a"), asked=100.0, answered=101.0)


def test_nodes_that_agree():
    compare()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"probe": None}, r"runs_dir: /runs/a is not on storage that all nodes share: node 10\.0\.0\.2"),
        ({"probe": "another"}, "is not on storage"),
        ({"packages": PACKAGES | {"torch": "1.0"}}, r"node 10\.0\.0\.2 has torch 1\.0, this machine"),
        ({"clock": 900.0}, "its clock differs by 799 s"),
    ],
)
def test_nodes_that_differ_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        compare(**changes)


def test_workers_fit_by_their_scarcest_resource():
    assert workers_that_fit({"CPU": 8.0, "GPU": 2.0}, {"CPU": 2.0, "GPU": 1.0}) == 2
    assert workers_that_fit({"CPU": 8.0}, {"CPU": 1.0, "GPU": 1.0}) == 0


def test_room_for_the_checkpoints(tmp_path, monkeypatch):
    base = prepare_base(str(write_tiny_model(tmp_path / "model")))
    run = tmp_path / "run"
    run.mkdir()

    def config(*overrides):
        text = "kind: run\nname: a\nbase_model: m\nmax_steps: 1\ndata: {train: x}\n"
        return parse_config(text, overrides, kind="run", source="x")

    full = config("adapter=null", "checkpoint.keep=2")
    weights = sum(path.stat().st_size for path in base.directory.glob("*.safetensors"))
    assert checkpoint_bytes(full, base) == pytest.approx(3 * weights, rel=0.05)  # float32: three times 4 bytes
    assert checkpoint_bytes(config("adapter.rank=4"), base) < checkpoint_bytes(config(), base) < 3 * weights
    larger = checkpoint_bytes(config("adapter.modules_to_save=[embed_tokens]"), base)
    assert larger == checkpoint_bytes(config(), base) + 12 * 64 * 259
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10 * weights + 1000))
    check_disk(full, base, run)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=9 * weights))
    with pytest.raises(UserError, match=r"runs_dir: .* MiB free; 2 checkpoints of .* lower checkpoint\.keep"):
        check_disk(full, base, run)


def reach(rank: int, port: int, out: Path) -> None:
    import torch.distributed as dist

    from ftray.model.hardware import choose_hardware
    from ftray.train.on_ray.communication import measure_all_reduce

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    hardware = choose_hardware(use_gpu=False)
    rate = measure_all_reduce(hardware, timeout_s=20)
    if rank == 1:
        time.sleep(6)  # the other waits in vain
        return
    try:
        measure_all_reduce(hardware, timeout_s=2)
        said = "nothing"
    except UserError as error:
        said = str(error)
    out.write_text(f"{rate} {said}")


def test_workers_that_do_not_reach_each_other_are_told(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(reach, args=(port, tmp_path / "out"), nprocs=2)
    rate, said = (tmp_path / "out").read_text().split(" ", 1)
    assert float(rate) > 1e6
    assert "cannot exchange data (gloo: nothing arrived within 2 s)" in said
    assert "set GLOO_SOCKET_IFNAME" in said
