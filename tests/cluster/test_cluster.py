"""A head and two training hosts, each a network namespace with its own Ray node, token auth on: what a cluster does to
a run does not change its result. `make test-cluster`."""

import contextlib
import itertools
import json
import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from hosts import BIN, can_make_hosts, running_cluster
from safetensors.torch import load_file

from ftray.errors import FtrayError
from ftray.storage import check_sizes, read_json
from ftray.tracking.events import read_events
from ftray.tracking.metrics import read_metrics

pytestmark = pytest.mark.skipif(not can_make_hosts(), reason="needs root and `ip` to make network namespaces")
LORA = {"zero.stage": "3"}
CONSTANT = {"zero.stage": "2", "optimizer.schedule": "constant"}
FULL = {"adapter": "null", "zero.stage": "2", "optimizer.learning_rate": "1e-3"}


@pytest.fixture(scope="module")
def cluster():
    with running_cluster(num_workers=2) as cluster:
        yield cluster


@pytest.fixture
def train(cluster, tiny_model, train_file, eval_file, tmp_path):
    """Starts `ftray train` on the head host; returns (process, run directory)."""

    def start(name: str, **settings: str) -> tuple[subprocess.Popen, Path]:
        config = tmp_path / "run.yaml"
        config.write_text(
            f"kind: run\nname: demo\nbase_model: {tiny_model}\nmax_steps: 240\nruns_dir: {tmp_path}/runs\n"
            f"data: {{train: {train_file}, eval: {eval_file}}}\nworkers: {{count: 2, max_failures: 8}}\n"
            "batch: {examples_per_step: 4}\noptimizer: {learning_rate: 5e-3}\ncheckpoint: {every: 10}\n"
            "evaluation: {every: 600}\nguard: {hang_timeout_s: 15}\n"
        )
        overrides = [f"{key}={value}" for key, value in settings.items()]
        command = [str(BIN / "ftray"), "train", str(config), f"name={name}", *overrides]
        process = cluster.run(*command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return process, tmp_path / "runs" / name

    return start


def ended(process: subprocess.Popen, *, timeout_s: float = 280) -> str:
    out, _ = process.communicate(timeout=timeout_s)
    assert process.returncode == 0, out
    return out


def wait_for_step(run: Path, step: int, process: subprocess.Popen, *, timeout_s: float = 150) -> None:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if any(record["step"] >= step for record in read_metrics(run)):
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    raise AssertionError(f"{run.name}: step {step} was not reached; {read_events(run)}")


def same(one: Path, other: Path) -> None:
    """Bitwise: losses, evaluation and final weights."""
    losses = [[r["loss"] for r in read_metrics(run) if "loss" in r] for run in (one, other)]
    assert losses[0] == losses[1]
    results = [read_json(run / "result.json") for run in (one, other)]
    assert results[0]["final_eval_loss"] == results[1]["final_eval_loss"]
    files = [next(Path(result["output"]).glob("*.safetensors")) for result in results]
    weights = [load_file(file) for file in files]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def starts(run: Path) -> int:
    return sum(event["event"] == "workers_started" for event in read_json(run / "result.json")["events"])


def test_lora_with_zero_3_over_two_hosts_survives_them(cluster, train):
    process, calm = train("calm", **LORA)
    ended(process)
    process, hurt = train("hurt", **LORA)
    one, two = cluster.hosts[1:]

    wait_for_step(hurt, 15, process)
    cluster.kill_worker(two)
    wait_for_step(hurt, 41, process)
    cluster.stop_node(two)  # the whole host, in the middle of a step
    time.sleep(5)
    cluster.start_node(two)  # and it comes back
    wait_for_step(hurt, 71, process)
    cluster.cut(one)
    time.sleep(20)
    cluster.fix(one)
    time.sleep(1)
    if one.process is not None and one.process.poll() is not None:
        cluster.start_node(one)  # the head gave the host up, and its node ended: a supervisor starts it again
    ended(process)
    same(calm, hurt)
    assert starts(calm) == 1
    assert starts(hurt) >= 3
    assert len(json.dumps(read_json(hurt / "result.json")["events"])) > 0


def test_elastic_workers_lose_a_host_and_get_it_back(cluster, train):
    """The same data in every step whatever the number of workers, so the same losses but for rounding."""
    process, calm = train("steady", max_steps="80", **CONSTANT)
    ended(process)
    process, run = train("elastic", max_steps="100000", **CONSTANT, **{"workers.count": "[1, 2]"})
    two = cluster.hosts[2]
    wait_for_step(run, 15, process)
    cluster.stop_node(two)
    wait_for_workers(run, [2, 1], process)
    cluster.start_node(two)
    wait_for_workers(run, [2, 1, 2], process)
    after = last_step(run)
    wait_for_step(run, after + 10, process)
    subprocess.run([BIN / "ftray", "runs", "stop", "elastic", "--runs-dir", run.parent], check=True)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1, out
    steps, steady = ([r for r in read_metrics(path) if "loss" in r] for path in (run, calm))
    assert [r["step"] for r in steps] == list(range(1, len(steps) + 1))
    assert [r["num_tokens"] for r in steps[:80]] == [r["num_tokens"] for r in steady]
    assert [r["loss"] for r in steps[:80]] == pytest.approx([r["loss"] for r in steady], rel=1e-3)


def wait_for_workers(run: Path, counts: list[int], process: subprocess.Popen, *, timeout_s: float = 150) -> None:
    """Until the groups of workers that were started had these sizes, each at least once, in this order."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        started = [event["workers"] for event in read_events(run) if event["event"] == "workers_started"]
        if [size for size, _ in itertools.groupby(started)] == counts:
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.2)
    raise AssertionError(f"no group of {counts[-1]} workers: {read_events(run)}")


def last_step(run: Path) -> int:
    return max((record["step"] for record in read_metrics(run)), default=0)


def test_full_fine_tuning_survives_a_full_disk_a_dead_driver_and_a_damaged_checkpoint(cluster, train):
    runs = cluster.small_disk
    process, _ = train("calm", **FULL, runs_dir=str(runs))
    calm = runs / "calm"
    ended(process)
    process, _ = train("hurt", **FULL, runs_dir=str(runs))
    hurt = runs / "hurt"
    wait_for_step(hurt, 15, process)
    filler = runs / "filler"
    fill(filler)
    time.sleep(5)  # many steps and several saves, none of which can be written down
    assert process.poll() is None, process.communicate()[0]
    filler.unlink()
    wait_for_trouble(hurt, process)
    wait_for_checkpoints(hurt, 2, process)  # one from before and one from after, or both from after
    os.killpg(process.pid, signal.SIGKILL)  # the driver
    process.wait()
    newest = max((hurt / "checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]))
    shard = newest / "state" / "rank-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    process, _ = train("hurt", **FULL, runs_dir=str(runs))
    out = ended(process)
    assert f"resumes from {newest}" not in out
    assert "resumes from" in out
    same(calm, hurt)


def test_a_directory_that_the_hosts_do_not_share_is_refused(cluster, train, tmp_path):
    """/tmp/ray is each host's own."""
    process, _ = train("lost", runs_dir="/tmp/ray/runs")
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 2, out
    assert "runs_dir: /tmp/ray/runs/lost is not on storage that all nodes share: node 10.77.0." in out
    assert "Traceback" not in out


def test_a_sweep_survives_a_worker_a_full_disk_ctrl_c_and_a_dead_driver(
    cluster, tiny_model, train_file, eval_file, tmp_path
):
    run, sweep, runs = tmp_path / "run.yaml", tmp_path / "sweep.yaml", cluster.small_disk / "sweeps"
    run.write_text(
        f"kind: run\nname: demo\nbase_model: {tiny_model}\nmax_steps: 160\nruns_dir: {runs}\n"
        f"data: {{train: {train_file}, eval: {eval_file}}}\nworkers: {{count: 2}}\nregistry: {tmp_path}/registry\n"
        "batch: {examples_per_step: 4}\ncheckpoint: {every: 10}\nevaluation: {every: 50}\n"
    )
    sweep.write_text(
        f"kind: sweep\nname: rates\nrun: {run}\nspace: {{optimizer.learning_rate: [1e-5, 5e-3]}}\n"
        "search: {algorithm: grid, max_concurrent: 1}\n"
    )

    def ftray(*words: str) -> subprocess.Popen:
        return cluster.run(
            str(BIN / "ftray"), *words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path
        )

    process = ftray("sweep", str(sweep))
    trials = runs / "rates/trials"
    wait_for_step(trials / "t001", 15, process)
    first = read_json(trials / "t000/result.json")
    cluster.kill_worker(cluster.hosts[2])
    wait_for_step(trials / "t001", 41, process)
    filler = runs / "filler"
    fill(filler)
    time.sleep(5)
    filler.unlink()
    if process.poll() is None:
        with contextlib.suppress(AssertionError):
            wait_for_step(trials / "t001", 71, process)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
        out, _ = process.communicate(timeout=60)
        assert "rates: stopped; 1 finished, 1 running" in out, out
    else:  # Ray Train's own notes met the full disk
        assert "No space left on device" in process.communicate()[0]
    assert process.returncode == 1
    process = ftray("sweep", str(sweep))
    wait_for_step(trials / "t001", 111, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    out = ended(ftray("sweep", str(sweep)))
    assert "best: t001 (optimizer.learning_rate=0.005)" in out
    assert "published rates@1" in out
    assert read_json(trials / "t000/result.json") == first
    again = next(line for line in out.splitlines() if line.startswith("again by itself: "))
    ended(ftray(*shlex.split(again.removeprefix("again by itself: "))[1:]))
    alone, fused = ([r for r in read_metrics(run) if "loss" in r] for run in (runs / "rates-t001", trials / "t001"))
    assert [r["step"] for r in fused] == list(range(1, 161))
    # Sums of another order, which grow apart over the steps; a resume that forgot anything would be seen at once.
    assert [r["loss"] for r in fused[:80]] == pytest.approx([r["loss"] for r in alone[:80]], rel=5e-3)
    results = [read_json(run / "result.json") for run in (runs / "rates-t001", trials / "t001")]
    assert results[0]["final_eval_loss"] == pytest.approx(results[1]["final_eval_loss"], rel=0.05)


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:  # a buffer's rest would fail once more when the file is closed
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError:
            return


def wait_for_checkpoints(run: Path, count: int, process: subprocess.Popen, *, timeout_s: float = 150) -> None:
    """Until so many are whole."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if sum(is_whole(path) for path in (run / "checkpoints").glob("step-*")) >= count:
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    raise AssertionError(f"{run.name}: no {count} checkpoints; {read_events(run)}")


def is_whole(checkpoint: Path) -> bool:
    try:
        check_sizes(checkpoint)
    except FtrayError:
        return False
    return True


def wait_for_trouble(run: Path, process: subprocess.Popen, *, timeout_s: float = 90) -> None:
    """The full disk meets a save of ours, the notes of Ray Train's controller, or a worker that is then started again,
    whichever comes first."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        events = [event["event"] for event in read_events(run)]
        if {"save_failed", "controller_failed"} & {*events} or events.count("workers_started") > 1:
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    raise AssertionError(f"no trouble: {read_events(run)}")
