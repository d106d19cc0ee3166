"""Runs through Ray Train with two workers, as `ftray train` makes them."""

import gzip
import json
import os
import secrets
import shutil
import signal
from pathlib import Path

import psutil
import pytest
import torch
from listening import for_others, watched
from safetensors.torch import load_file
from tiny import chat_rows, write_jsonl
from watching import Recorder

from ftray.errors import FtrayError, UserError
from ftray.serve.app import ray_log_directory
from ftray.storage import read_json, verify_directory
from ftray.tracking.metrics import read_metrics
from ftray.tracking.samples import read_samples
from ftray.train.checkpoints.listing import newest_whole_checkpoint
from ftray.train.launch import launch
from ftray.train.prepare import prepare


def files_with(secret: str, *places: Path) -> list[Path]:
    files = [path for place in places for path in place.rglob("*") if path.is_file() and not path.is_socket()]
    return [path for path in files if secret.encode() in path.read_bytes()]


def test_a_run_leaves_a_complete_directory(ray_session, config, tmp_path, monkeypatch, train_file):
    secret = secrets.token_hex(20)
    monkeypatch.setenv("WANDB_API_KEY", secret)
    settings = {"tracking.wandb": "offline", "tracking.tensorboard": "true", "evaluation.samples": 3}
    recorder = Recorder()
    with watched() as listened:
        result = launch(prepare(config(**settings)), recorder.watcher(), profile_steps=2)
    assert {"raylet", "gcs_server"} <= {process for process, _ in listened}
    assert for_others(listened) == set()  # Ray, its pages of metrics, the workers and what they speak to each other by
    run = tmp_path / "runs" / "demo"
    assert {p.name for p in run.iterdir()} >= {
        "config.json", "environment.json", "metrics.jsonl", "checkpoints", "adapter", "result.json",
        "report.html", "wandb",
    }  # fmt: skip
    steps = [record for record in read_metrics(run) if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, 9))
    assert set(steps[0]) == {
        "step", "loss", "learning_rate", "grad_norm", "num_tokens", "num_trained_tokens", "tokens_per_s", "seconds",
        "time", "mfu", "memory_gib",
    }  # fmt: skip
    assert [set(r) for r in read_metrics(run) if "eval_loss" in r] == [{"step", "eval_loss"}] * 2
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert sorted(p.name for p in (run / "checkpoints").glob("step-*")) == ["step-4", "step-8"]
    assert verify_directory(run / "adapter").metadata["step"] == 8
    assert result["data"]["train"]["rows"] == 40
    assert list((run / "wandb").glob("offline-run-*"))
    report = (run / "report.html").read_text()
    assert "<svg" in report
    assert "http://" not in report.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    assert 0 < steps[-1]["mfu"] < 1
    samples = read_samples(run)
    assert [(sample["step"]) for sample in samples] == [4, 4, 4, 8, 8, 8]
    assert samples[0]["prompt"].endswith("<|im_start|>assistant")
    assert samples[0]["expected"] == samples[0]["prompt"].split("user\n")[1].split()[0]  # the rows' rule
    assert samples[0]["prompt"] == samples[3]["prompt"]
    assert samples[0]["expected"] not in ("", samples[0]["answer"])
    assert "Sampled answers" in report
    trace = json.loads(gzip.decompress((run / "profile" / "rank-0.trace.json.gz").read_bytes()))
    assert any(event.get("name") == "aten::mm" for event in trace["traceEvents"])
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))
    assert any("2 workers run on cpu, float32" in line and "all-reduce at" in line for line in recorder.lines)
    assert [event["event"] for event in result["events"]] == ["workers_started"]
    assert any("40 examples" in line and "longest" in line for line in recorder.lines)

    # what the workers were given stands nowhere: not in the run's directory, nor in Ray's logs
    logs = ray_log_directory().parent
    assert files_with("RayTrainWorker", logs), "the logs of this session"
    assert files_with(secret, run, logs) == []

    # the same command again: the result stands
    again = Recorder()
    assert launch(prepare(config(**settings)), again.watcher()) == result
    assert "finished already" in again.lines[0]

    # what it left is lost or damaged: made again from the last checkpoint
    weights = run / "adapter/adapter_model.safetensors"
    whole = weights.read_bytes()
    for damage in (lambda: shutil.rmtree(run / "adapter"), lambda: weights.write_bytes(whole[:-1])):
        damage()
        again = Recorder()
        assert launch(prepare(config(**settings)), again.watcher()) == result
        assert "it is made again from" in again.lines[0]
        assert weights.read_bytes() == whole

    # moved, and its data as well: the same run, and not with other data
    moved = tmp_path / "moved/renamed"
    shutil.copytree(run, moved)
    place = {"runs_dir": moved.parent, "name": "renamed", "data__train": shutil.copy(train_file, tmp_path)}
    found = launch(prepare(config(**settings | place)), Recorder().watcher())
    assert found == result | {"output": str(moved / "adapter")}
    others = write_jsonl(tmp_path / "others.jsonl", chat_rows(40, seed=9))
    with pytest.raises(UserError, match=r"data\.train: the data differ"):
        launch(prepare(config(**settings | place | {"data__train": others})), Recorder().watcher())

    # another config under the same name: refused before any work, nothing lost
    with pytest.raises(UserError, match=r"optimizer.learning_rate: was 0.005, is 0.1\n.*--fresh"):
        launch(prepare(config(optimizer__learning_rate=0.1)), Recorder().watcher())
    assert read_json(run / "result.json") == result

    # not finished, but with other data: refused
    (run / "result.json").unlink()
    data = write_jsonl(tmp_path / "other.jsonl", chat_rows(40, seed=9))
    stored = read_json(run / "config.json")
    stored["data"]["train"] = str(data)
    (run / "config.json").write_text(json.dumps(stored))
    with pytest.raises(UserError, match=r"data\.train: the data differ"):
        launch(prepare(config(data__train=data, **settings)), Recorder().watcher())


def signal_a_worker(number: signal.Signals):
    """By its id, among the processes of this test session."""
    mine = psutil.Process().children(recursive=True)
    workers = [p for p in mine if "RayTrainWorker" in " ".join(p.cmdline())]
    os.kill(workers[-1].pid, number)


def test_workers_that_die_or_hang_are_replaced_and_the_run_ends_the_same(ray_session, config, tmp_path):
    long = {"max_steps": 60, "checkpoint.every": 5, "evaluation.every": 60, "guard.hang_timeout_s": 8}
    calm = launch(prepare(config(name="calm", **long)), Recorder().watcher())
    recorder = Recorder({7: lambda: signal_a_worker(signal.SIGKILL), 25: lambda: signal_a_worker(signal.SIGSTOP)})
    hurt = launch(prepare(config(name="hurt", **long)), recorder.watcher())
    assert not recorder.actions, "nothing was done to a worker"
    events = [(event["event"], event.get("after_step", -1) % 5) for event in hurt["events"]]
    started = ("workers_started", 0)
    assert events == [started, started, ("hang", 4), started]
    assert any("stands still and answers nothing" in line for line in recorder.lines)
    runs = tmp_path / "runs"
    steps = [[r["loss"] for r in read_metrics(runs / name) if "loss" in r] for name in ("calm", "hurt")]
    assert steps[0] == steps[1]
    assert hurt["final_eval_loss"] == calm["final_eval_loss"]
    weights = [load_file(runs / name / "adapter" / "adapter_model.safetensors") for name in ("calm", "hurt")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_a_bad_step_is_passed_over_or_ends_the_run(ray_session, config, tmp_path):
    """One row of noise among rows that repeat: its loss is far above the others'."""
    rows = chat_rows(1) * 40
    rows[25] = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "}{@#~" * 12}]}
    path = write_jsonl(tmp_path / "noise.jsonl", rows)
    settings = {
        "data__train": path,
        "data__shuffle": "false",
        "workers__count": 1,
        "batch__examples_per_step": 2,
        "max_steps": 18,
        "guard__spike_factor": 3,
        "optimizer__schedule": "constant",
    }
    with pytest.raises(
        FtrayError, match=r"step 13: the loss is .* the rows 25, 26 of data.train.*guard.on_bad_loss=skip"
    ):
        launch(prepare(config(name="stops", **settings)), Recorder().watcher())
    assert newest_whole_checkpoint(tmp_path / "runs" / "stops").name == "step-12"
    result = launch(prepare(config(name="stops", guard__on_bad_loss="skip", **settings)), Recorder().watcher())
    kinds = [(event["event"], event.get("after_step", event.get("step"))) for event in result["events"]]
    assert kinds == [("workers_started", 0), ("workers_started", 12), ("step_skipped", 13), ("workers_started", 12)]
    assert result["events"][2]["rows"] == [25, 26]
    steps = [record["step"] for record in read_metrics(tmp_path / "runs" / "stops") if "loss" in record]
    assert steps == [*range(1, 13), *range(14, 19)]


def test_full_fine_tuning_with_zero_3_gives_a_model_that_serves(ray_session, config, tmp_path, renderer):
    from transformers import AutoModelForCausalLM

    from ftray.config.serve import AdaptersConfig, EngineConfig
    from ftray.infer.engines import generate
    from ftray.infer.protocol import Request, SamplingParams
    from ftray.infer.torch_engine.engine import TorchEngine
    from ftray.model.base import prepare_base
    from ftray.model.hardware import choose_hardware

    result = launch(prepare(config(adapter="null", zero__stage=3, max_steps=4)), Recorder().watcher())
    model, report = AutoModelForCausalLM.from_pretrained(result["output"], output_loading_info=True)
    assert not report["missing_keys"]
    prompt = renderer.prompt_ids(chat_rows(1)[0]["messages"][:1])
    settings = EngineConfig(context_tokens=128, kv_cache_tokens=256)
    engine = TorchEngine(prepare_base(result["output"]), choose_hardware(), settings, AdaptersConfig(max_rank=8))
    served = generate(engine, [Request("a", prompt, SamplingParams(temperature=0, max_tokens=6))])["a"]
    stop = list(engine.stop_ids)
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=stop)
    assert served == engine.tokenizer.decode(expected[0, len(prompt) :], skip_special_tokens=True)


def test_more_workers_than_the_cluster_has(ray_session, config):
    with pytest.raises(
        UserError, match=r"workers.count: 9 workers of 1 CPU do not fit: the cluster has 1 node with 4 CPUs"
    ):
        launch(prepare(config(workers__count=9)), Recorder().watcher())
    with pytest.raises(UserError, match=r"2 workers of 1 CPU and 1 GPU do not fit"):
        launch(prepare(config(name="gpu", workers__gpus_each=1)), Recorder().watcher())


def test_a_mistake_found_in_the_workers_is_not_retried(ray_session, config):
    with pytest.raises(UserError, match=r"adapter.targets: .*nope"):
        launch(prepare(config(adapter="{targets: [nope]}", workers__count=1)), Recorder().watcher())
