"""A run directory in an object store: the same run as on a disk, stopped and gone on with from another machine."""

import json
import shutil

import pytest
from s3 import s3_server
from safetensors.torch import load_file
from watching import Recorder

from ftray.cli.main import main
from ftray.errors import InterruptedRunError, UserError
from ftray.storage import ObjectStore, read_json, verify_directory
from ftray.tracking.metrics import read_metrics
from ftray.train.launch import launch
from ftray.train.prepare import prepare
from ftray.train.runs import object_store, rank_directory
from ftray.train.runs.store import run_store
from ftray.train.runs.uri import local_root


@pytest.fixture
def runs_dir(tmp_path):
    with s3_server("bucket") as url:
        yield f"{url}/{tmp_path.name}"
    shutil.rmtree(local_root(f"{url}/{tmp_path.name}"), ignore_errors=True)


def losses(run):
    return [(r["step"], r.get("loss"), r.get("eval_loss")) for r in read_metrics(run)]


def test_a_run_in_a_store_is_the_run_on_a_disk(ray_session, config, runs_dir, tmp_path, monkeypatch, capsys):
    for module in (object_store, rank_directory):
        monkeypatch.setattr(module, "SYNC_S", 0.3)
    settings = {"max_steps": 16, "evaluation.samples": 2, "checkpoint.keep": 2}
    whole = launch(prepare(config(**settings)), Recorder().watcher())
    settings["runs_dir"] = runs_dir
    recorder = Recorder()
    with pytest.raises(InterruptedRunError, match=rf"the checkpoint {runs_dir}/demo/checkpoints/step-\d+ stands"):
        launch(prepare(config(**settings)), recorder.watcher(), until_step=10)
    assert any("2 workers run on cpu" in line for line in recorder.lines)
    store = ObjectStore(f"{runs_dir}/demo")
    there = {found.key for found in store.entries()}
    assert there >= {"config.json", "environment.json", "metrics.jsonl", "events.jsonl"}
    assert "driver.lease" not in there

    assert main_says(capsys, "runs", "list", "--runs-dir", runs_dir).split("\n")[1].split()[:3] == [
        "demo",
        "interrupted",
        "10/16",
    ]
    with pytest.raises(UserError, match="--fresh"):
        launch(prepare(config(**settings), fresh=True), Recorder().watcher())

    # The newest checkpoint is damaged: what its manifest does not prove does not count.
    newest = max(int(key.split("/")[1][5:]) for key in there if key.endswith("trainer.json"))
    state = next(found for found in store.entries() if found.key.startswith(f"checkpoints/step-{newest}/state/"))
    store.write(state.key, bytes(state.size))
    shutil.rmtree(local_root(runs_dir))  # as if this were another machine
    again = Recorder()
    result = launch(prepare(config(**settings)), again.watcher())
    run = run_store(runs_dir).look() / "demo"
    assert losses(run) == losses(tmp_path / "runs/demo")
    assert result["steps"] == 16
    assert result["final_loss"] == whole["final_loss"]
    assert result["output"] == f"{runs_dir}/demo/adapter"
    keys = {found.key for found in store.entries()}
    steps = sorted({key.split("/")[1] for key in keys if key.startswith("checkpoints/")})
    assert steps == ["step-12", "step-16"]
    assert {"report.html", "result.json", "samples.jsonl"} <= keys
    assert read_json(run / "result.json") == result

    for found in store.entries():
        if found.key.startswith("adapter/"):
            store.download(found, tmp_path / found.key)
    verify_directory(tmp_path / "adapter")
    mine, theirs = (
        load_file(path / "adapter/adapter_model.safetensors") for path in (tmp_path, tmp_path / "runs/demo")
    )
    assert all((mine[name] == theirs[name]).all() for name in theirs)

    stands = Recorder()
    assert launch(prepare(config(**settings)), stands.watcher()) == result
    assert f"its result stands ({runs_dir}/demo/result.json)" in stands.lines[0]


def test_a_sweep_in_a_store_goes_on_on_another_machine(
    ray_session, runs_dir, tiny_model, train_file, eval_file, tmp_path, capsys
):
    run = tmp_path / "run.yaml"
    run.write_text(
        f"kind: run\nname: r\nbase_model: {tiny_model}\nmax_steps: 8\nregistry: {tmp_path}/registry\n"
        f"data: {{train: {train_file}, eval: {eval_file}}}\nbatch: {{examples_per_step: 4}}\n"
        "workers: {count: 2}\nevaluation: {every: 2}\ncheckpoint: {every: 2}\n"
    )
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(
        f"kind: sweep\nname: s\nrun: {run}\noverrides: {{runs_dir: {runs_dir}}}\n"
        "space: {optimizer.learning_rate: [5e-3]}\nsearch: {algorithm: grid}\n"
    )
    store, trial = ObjectStore(f"{runs_dir}/s"), ObjectStore(f"{runs_dir}/s/trials/t000")
    out = main_says(capsys, "sweep", str(sweep), "search.budget.steps=4", code=1)
    assert "fused: 1 at a time" in out
    assert "no trial finished" in out
    there = {found.key for found in store.entries()}
    assert there >= {"sweep.json", "trials.jsonl", "sweep.html", "trials/t000/checkpoints/step-4/manifest.json"}
    assert not [key for key in there if "lease" in key]

    forget_this_machine(runs_dir)
    main_says(capsys, "sweep", "clone-trial", "s", "t000", "optimizer.learning_rate=1e-9", "--runs-dir", runs_dir)
    out = main_says(capsys, "sweep", str(sweep), "search.budget.steps=9")
    assert "t000  step 6" in out
    assert "t000  step 4" not in out
    steps = [
        json.loads(line)["step"] for line in (trial.read("metrics.jsonl") or b"").splitlines() if b'"loss"' in line
    ]
    assert steps == list(range(1, 9)), "no step is missing or doubled"
    assert "published s@1" in out
    assert not list(store.keys("requests"))
    assert not list(trial.keys("checkpoints"))
    first = trial.find("result.json")

    forget_this_machine(runs_dir)
    out = main_says(capsys, "sweep", str(sweep), "search.fused=off")
    assert "apart: " in out
    assert "t001  step 8" in out
    assert "best: t000" in out
    assert trial.find("result.json") == first


def forget_this_machine(runs_dir: str) -> None:
    """As if what follows ran on another one."""
    for path in (local_root(runs_dir), local_root(f"{runs_dir}/s/trials")):
        shutil.rmtree(path)


def main_says(capsys, *words: str, code: int = 0) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    assert (ended.value.code or 0) == code
    return "".join(capsys.readouterr())
