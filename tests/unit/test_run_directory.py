import json
import shutil
import time

import pytest
import torch
from tiny import write_checkpoint

from ftray.config import parse_config
from ftray.config.run import OptimizerConfig
from ftray.errors import UserError
from ftray.storage import read_json, write_json
from ftray.tracking.events import record_event
from ftray.tracking.metrics import MetricsFollower, MetricsLog, read_metrics
from ftray.tracking.report import AnswerTable, shared_head, write_report
from ftray.tracking.status import write_status
from ftray.tracking.wandb import choose_mode
from ftray.train.checkpoints.listing import newest_whole_checkpoint
from ftray.train.engine.schedule import make_schedule
from ftray.train.runs.claim import refuse_vanishing_directory
from ftray.train.runs.disk import DiskRun
from ftray.train.runs.store import run_store


def make_config(tmp_path, *overrides):
    text = f"kind: run\nname: demo\nbase_model: m\nepochs: 1\nruns_dir: {tmp_path}/runs\ndata: {{train: x.jsonl}}\n"
    return parse_config(text, overrides, kind="run", source="x")


def test_a_name_belongs_to_one_config(tmp_path):
    run = DiskRun(make_config(tmp_path), fresh=False)
    assert (run.resume_from, run.finished, run.changes) == (None, None, [])
    # A start that failed before its first step holds no name.
    assert DiskRun(make_config(tmp_path, "seed=2"), fresh=False).changes == []
    DiskRun(make_config(tmp_path), fresh=False)
    write_checkpoint(run.path, 3)
    changed = DiskRun(make_config(tmp_path, "workers.count=4", "zero.stage=3"), fresh=False)
    assert changed.changes == ["workers.count: was 1, is 4", "zero.stage: was 2, is 3"]
    with pytest.raises(UserError, match=r"seed: was 0, is 1\n"):
        DiskRun(make_config(tmp_path, "seed=1"), fresh=False)
    fresh = DiskRun(make_config(tmp_path, "seed=1"), fresh=True)
    assert fresh.resume_from is None
    aside = [p for p in fresh.path.parent.iterdir() if p.name.startswith("demo.")]
    assert (aside[0] / "checkpoints" / "step-3").is_dir(), "the old run is set aside, not deleted"


def test_the_newest_whole_checkpoint_is_used(tmp_path):
    for step in (5, 10, 100):
        write_checkpoint(tmp_path, step)
    assert newest_whole_checkpoint(tmp_path).name == "step-100"  # by number, not by name
    moments = tmp_path / "checkpoints" / "step-100" / "moments.safetensors"
    moments.write_bytes(moments.read_bytes()[:-1])
    assert newest_whole_checkpoint(tmp_path).name == "step-10"
    (tmp_path / "checkpoints" / "step-10" / "manifest.json").unlink()
    assert newest_whole_checkpoint(tmp_path).name == "step-5"


def test_a_jobs_temporary_directory_is_no_place_for_a_run(tmp_path, monkeypatch):
    place = tmp_path / "working_dir_files" / "pkg"
    place.mkdir(parents=True)
    monkeypatch.chdir(place)
    config = parse_config("kind: run\nname: demo\nbase_model: m\nepochs: 1\ndata: {train: x}\n", kind="run", source="x")
    with pytest.raises(UserError, match="runs_dir=/path/on/all/nodes"):
        refuse_vanishing_directory(config)
    refuse_vanishing_directory(make_config(tmp_path))


def test_a_run_has_one_driver(tmp_path):
    config = make_config(tmp_path)
    runs = run_store(config.runs_dir)
    with runs.open(config):
        with pytest.raises(UserError, match="is running already, by another process"), runs.open(config):
            pass
    with runs.open(config):
        pass


def test_a_resumed_run_forgets_the_steps_after_its_checkpoint(tmp_path):
    log = MetricsLog(tmp_path, resume_step=0)
    follower = MetricsFollower(tmp_path)
    for step in (1, 2, 3):
        log.append({"step": step, "loss": 1.0})
    assert [r["step"] for r in follower.poll()] == [1, 2, 3]
    assert follower.poll() == []
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    resumed = MetricsLog(tmp_path, resume_step=2)
    resumed.append({"step": 3, "loss": 2.0})
    resumed.close()
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path)] == [(1, 1.0), (2, 1.0), (3, 2.0)]
    assert follower.poll()[-1] == {"step": 3, "loss": 2.0}


def test_schedules_start_and_end_where_they_should():
    def rates(schedule, warmup):
        config = OptimizerConfig(learning_rate=1.0, schedule=schedule, warmup_steps=warmup)
        return [round(make_schedule(config, num_steps=8)(step), 4) for step in range(8)]

    assert rates("constant", 0) == [1.0] * 8
    assert rates("linear", 0) == [1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    assert rates("cosine", 4) == [0.25, 0.5, 0.75, 1.0, 1.0, 0.8536, 0.5, 0.1464]


def test_cosine_is_transformers_cosine():
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=0, num_training_steps=10)
    ours = make_schedule(OptimizerConfig(learning_rate=1.0, schedule="cosine"), num_steps=10)
    for step in range(10):
        assert ours(step) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


def test_wandb_never_asks_for_a_key():
    assert choose_mode("off", has_key=True) == "disabled"
    assert choose_mode("auto", has_key=False) == "offline"
    assert choose_mode("online", has_key=False) == "offline"
    assert choose_mode("auto", has_key=True) == "online"
    assert choose_mode("offline", has_key=True) == "offline"


def test_a_report_is_one_file_and_escapes_what_people_wrote(tmp_path):
    run = DiskRun(make_config(tmp_path), fresh=False).path
    log = MetricsLog(run, resume_step=0)
    for step in range(1, 4):
        log.append({"step": step, "loss": 1 / step, "learning_rate": 0.1, "grad_norm": 1.0, "tokens_per_s": 10.0})
    log.append({"step": 3, "eval_loss": 0.5})
    log.close()
    rows = [{"question": "<script>alert(1)</script>", "expected": "a", "base": "b", "tuned": "a"}]
    page = write_report(run, answers=AnswerTable(0.0, 1.0, None, "demo@1", rows)).read_text()
    assert page.count('<figure class="curves">') == 4
    assert "&lt;script&gt;" in page
    assert "alert(1)" not in page.replace("&lt;script&gt;alert(1)", "")
    assert "evaluation loss" in page
    assert "src=" not in page


def test_what_all_sampled_prompts_begin_with_is_said_once():
    head = "<|im_start|>system\nBe kind.<|im_end|>"
    prompts = [f"{head}\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant" for question in ("A?", "B?")]
    assert shared_head(prompts) == f"{head}\n<|im_start|>user"
    assert shared_head(prompts[:1]) == shared_head([]) == shared_head(["one line", "one line too"]) == ""


def test_a_reports_top_says_what_was_done_and_what_is_next(tmp_path):
    run = DiskRun(make_config(tmp_path, "optimizer.learning_rate=3e-4"), fresh=False).path
    log = MetricsLog(run, resume_step=0)
    for step in range(1, 4):
        log.append({"step": step, "loss": 1 / step, "seconds": 30.0})
    for step, loss in ((1, 0.9), (2, 0.5), (3, 0.7)):
        log.append({"step": step, "eval_loss": loss})
    log.close()
    write_status(run, "running", began=time.time(), num_steps=9)
    record_event(run, "workers_started", workers=2)
    page = write_report(run).read_text()
    for text in (
        "<td>status</td><td>running</td>",
        "<td>steps</td><td>3 of 9</td>",
        "<td>time in steps</td><td>1 min 30 s</td>",
        "<td>training loss</td><td>1.0000 at the first step, 0.3333 at the last</td>",
        "<td>best evaluation loss</td><td>0.5000 at step 2</td>",
        "workers: 2",
    ):
        assert text in page
    changed = page[page.index("What differs from the defaults") : page.index("<details>")]
    assert "learning_rate" in changed
    assert "weight_decay" not in changed
    counts = {"examples": 40, "tokens": 2000, "trained_tokens": 200}
    finished = {"final_loss": 0.3, "final_eval_loss": 0.5, "tokens_per_s": 10.0, "steps": 9, "data_digest": "d1"}
    write_json(run / "result.json", finished | {"data": {"train": counts}, "output": f"{run}/adapter"})
    page = write_report(run).read_text()
    assert "<td>status</td><td>finished</td>" in page
    assert "40 examples, 2,000 tokens, 200 of them trained" in page
    assert f"<td>next</td><td>ftray adapters publish {run}/adapter --name" in page


def test_config_json_is_the_resolved_config(tmp_path):
    run = DiskRun(make_config(tmp_path, "optimizer.learning_rate=3e-4"), fresh=False)
    stored = read_json(run.path / "config.json")
    assert stored["optimizer"]["learning_rate"] == 3e-4
    assert stored["zero"] == {"stage": 2, "offload": "none", "settings": {}}
    assert json.dumps(stored)
    assert read_json(run.path / "environment.json")["packages"]["torch"]
    shutil.rmtree(run.path)
