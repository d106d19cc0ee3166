"""Run directories whose files were lost, cut or changed: the file is named, lists show the rest, nothing begins anew
over what is there; and which run a directory holds is what it computes, not where it lies."""

import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import write_checkpoint
from typer.testing import CliRunner

from ftray.cli.main import app
from ftray.config import parse_config
from ftray.errors import DamagedError, UserError
from ftray.model.base import BaseModel
from ftray.storage import write_json
from ftray.sweep.journal import Journal
from ftray.tracking.events import DRIVER_EVENTS, EVENTS, read_events
from ftray.tracking.jobs import find_jobs
from ftray.tracking.metrics import METRICS, MetricsLog, read_metrics
from ftray.tracking.report import render_report
from ftray.tracking.runs import find_runs, read_run
from ftray.tracking.status import QUEUED, RUNNING, read_status, write_status
from ftray.train.checkpoints.listing import list_checkpoints, newest_whole_checkpoint
from ftray.train.prepared_data import PreparedData
from ftray.train.runs.claim import has_begun, holding, lock_of
from ftray.train.runs.disk import DiskRun
from ftray.train.runs.inputs import check_inputs
from ftray.train.runs.live_report import live_report

STEPS = [{"step": step, "loss": 3.0 - step / 10, "num_tokens": 10, "seconds": 0.5} for step in range(1, 7)]


def config_of(tmp_path, *overrides):
    text = "kind: run\nname: demo\nbase_model: m\nmax_steps: 6\ndata: {train: x.jsonl, eval: y.jsonl}\n"
    return parse_config(text, [f"runs_dir={tmp_path}/runs", *overrides], kind="run", source="x")


@pytest.fixture
def run(tmp_path) -> Path:
    """Six steps, saved after the second, fourth and sixth."""
    path = DiskRun(config_of(tmp_path)).path
    for step in (2, 4, 6):
        write_checkpoint(path, step)
    (path / METRICS).write_text("".join(json.dumps(record) + "\n" for record in STEPS))
    (path / EVENTS).write_text(json.dumps({"time": 1.0, "event": "workers_started", "workers": 1}) + "\n")
    write_json(path / "result.json", {"steps": 6})
    return path


def cut_config(run: Path) -> str:
    (run / "config.json").write_text('{"na')
    return "config.json"


def empty_result(run: Path) -> str:
    (run / "result.json").write_bytes(b"")
    return "result.json"


def cut_metrics(run: Path) -> str:
    lines = (run / METRICS).read_text().splitlines(keepends=True)
    (run / METRICS).write_text(lines[0] + lines[1][:9] + "\n" + "".join(lines[2:]))
    return "metrics.jsonl: line 2 "


def zeros_in_metrics(run: Path) -> str:
    with (run / METRICS).open("ab") as file:
        file.write(b"\0" * 40 + b"\n")
    return "metrics.jsonl: line 7 "


def bytes_in_metrics(run: Path) -> str:
    with (run / METRICS).open("ab") as file:
        file.write(b'{"step": 7, "loss": "\xff"}\n')
    return "metrics.jsonl: line 7 "


DAMAGES = [cut_config, empty_result, cut_metrics, zeros_in_metrics, bytes_in_metrics]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_list_marks_the_damaged_run_and_shows_the_rest(tmp_path, run, damage):
    shutil.copytree(run, tmp_path / "runs/whole")
    file = damage(run)
    found = {summary.name: summary for summary in find_runs(tmp_path / "runs")}
    assert (found["demo"].status, found["whole"].status) == ("damaged", "finished")
    assert f"{run}/{file}" in found["demo"].problem
    with pytest.raises(DamagedError, match=file):
        read_run(run)
    listed = CliRunner().invoke(app, ["runs", "list", "--runs-dir", str(tmp_path / "runs")]).output
    assert file in listed
    assert "whole" in listed


@pytest.mark.parametrize("line", [b"null\n", b"\0\0\n", b'{"time": 2.0, "ev\n', b'"\xff"\n', b"[1]\n"])
def test_an_event_that_is_none_is_passed_over(run, line):
    with (run / EVENTS).open("ab") as file:
        file.write(line)
        file.write(b'{"time": 3.0, "event": "hang"}\n')
    assert [event["event"] for event in read_events(run)] == ["workers_started", "hang"]
    assert read_run(run).status == "finished"


def test_metrics_that_are_damaged_after_the_checkpoint_are_forgotten(run):
    whole = (run / METRICS).read_bytes().splitlines(keepends=True)
    (run / METRICS).write_bytes(b"".join(whole[:5]) + b"\0\0\0\n" + whole[5])
    with pytest.raises(DamagedError, match=r"metrics\.jsonl: line 6 is no record"):
        MetricsLog(run, resume_step=6)
    MetricsLog(run, resume_step=4).close()
    assert [record["step"] for record in read_metrics(run)] == [1, 2, 3, 4]


def test_a_driver_names_the_line_before_anything_starts(tmp_path, run):
    cut_metrics(run)
    (run / "result.json").unlink()
    with pytest.raises(DamagedError, match="line 2 is no record"):
        DiskRun(config_of(tmp_path))


def test_events_keep_their_order_where_a_clock_was_set_back(run):
    (run / EVENTS).write_text('{"time": 100.0, "event": "workers_started"}\n{"time": 50.0, "event": "step_skipped"}\n')
    (run / DRIVER_EVENTS).write_text('{"time": 70.0, "event": "hang"}\n')
    assert [event["event"] for event in read_events(run)] == ["hang", "workers_started", "step_skipped"]


def test_a_checkpoints_name_and_step_agree(run, tmp_path):
    checkpoints = run / "checkpoints"
    shutil.copytree(checkpoints / "step-6", checkpoints / "step-006")
    (checkpoints / "step-²").mkdir()
    (checkpoints / "step-7").write_text("a file")
    assert [path.name for path in list_checkpoints(run)] == ["step-6", "step-4", "step-2"]
    (checkpoints / "step-6").rename(checkpoints / "step-9")
    notes = []
    assert newest_whole_checkpoint(run, log=notes.append).name == "step-4"
    assert notes == [f"passed over: {checkpoints}/step-9: holds step 6; it was renamed or copied"]
    (run / "result.json").unlink()
    assert DiskRun(config_of(tmp_path)).notes == notes


def test_where_no_checkpoint_is_whole_the_run_is_refused(run, tmp_path):
    for step in (2, 4, 6):
        (run / f"checkpoints/step-{step}/moments.safetensors").write_bytes(b"cut")
    (run / "result.json").unlink()
    with pytest.raises(DamagedError, match=r"no checkpoint is whole: .*step-6.*--fresh"):
        DiskRun(config_of(tmp_path))
    assert DiskRun(config_of(tmp_path), fresh=True).resume_from is None
    # A save that never came to its end is none: the run begins at its first step, as it would have.
    unsaved = DiskRun(config_of(tmp_path, "name=other")).path
    write_checkpoint(unsaved, 2)
    (unsaved / "checkpoints/step-2/manifest.json").unlink()
    assert DiskRun(config_of(tmp_path, "name=other")).resume_from is None


def test_a_directory_without_a_step_holds_no_name(tmp_path):
    path = DiskRun(config_of(tmp_path, "adapter.targets=[q_porj]")).path
    assert not has_begun(path)
    assert DiskRun(config_of(tmp_path)).changes == []
    (path / METRICS).write_text(json.dumps(STEPS[0]) + "\n")
    with pytest.raises(UserError, match=r"adapter\.targets: was .*\n.*--fresh"):
        DiskRun(config_of(tmp_path, "adapter.targets=[q_porj]"))


def test_a_moved_directory_is_the_same_run(tmp_path, run):
    (run / "result.json").unlink()
    moved = tmp_path / "elsewhere/renamed"
    shutil.move(run, moved)
    opened = DiskRun(config_of(tmp_path, f"runs_dir={tmp_path}/elsewhere", "name=renamed", "data.train=./x.jsonl"))
    assert opened.resume_from == moved / "checkpoints/step-6"
    assert [change.partition(":")[0] for change in opened.changes] == ["data.train", "name", "runs_dir"]
    with pytest.raises(UserError, match=r"data\.eval: was \"y\.jsonl\", is null"):
        DiskRun(config_of(tmp_path, f"runs_dir={tmp_path}/elsewhere", "name=renamed", "data.eval=null"))


def test_a_list_says_what_each_run_does_now(tmp_path, run):
    runs = tmp_path / "runs"

    def statuses() -> dict[str, str]:
        return {s.name: s.status for s in find_runs(runs, is_driven=lambda name: name == "driven")}

    driven = DiskRun(config_of(tmp_path, "name=driven")).path
    assert statuses() == {"demo": "finished", "driven": "running"}
    write_status(driven, QUEUED, began=time.time())
    assert statuses()["driven"] == "queued"
    write_status(driven, RUNNING, num_steps=60)
    (driven / METRICS).write_text("".join(json.dumps(record) + "\n" for record in STEPS))
    summary = read_run(driven, is_driven=True)
    assert (summary.status, summary.seconds_left) == ("running", 27.0)
    shutil.copytree(driven, runs / "killed")
    assert statuses()["killed"] == "interrupted"
    shutil.copytree(driven, runs / "broken")
    write_status(runs / "broken", "failed", error="no room")
    assert statuses()["broken"] == "failed"
    made = CliRunner().invoke(app, ["runs", "list", "--runs-dir", str(runs), "--json"])
    by_name = {found["name"]: found for found in json.loads(made.output)["runs"]}
    assert (by_name["broken"]["problem"], by_name["demo"]["steps"]) == ("no room", 6)


def test_a_lock_is_looked_at_without_a_trace(tmp_path):
    from ftray.train.runs.claim import is_held

    lock = lock_of(tmp_path, "demo")
    assert not is_held(lock)
    assert not lock.parent.exists()
    with holding(lock):
        assert is_held(lock)
    assert not is_held(lock)
    lock.unlink()
    lock.mkdir()
    with pytest.raises(UserError, match=r"demo: is a directory, where the run's lock file belongs"), holding(lock):
        pass


def test_sweeps_and_pipelines_are_listed(tmp_path):
    sweep = tmp_path / "runs/tries"
    write_json(sweep / "sweep.json", {"sweep": {"seeds": [1, 2]}})
    events = [{"event": "trial"}, *[{"event": "end"}] * 2, {"event": "trial"}, {"event": "end"}]
    (sweep / "trials.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    write_json(tmp_path / "runs/flow/pipeline.json", {"conditions": [], "version": "a@1"})
    (tmp_path / "runs/bad").mkdir()
    (tmp_path / "runs/bad/sweep.json").write_text("{")
    found = {job.name: (job.kind, job.status, job.done) for job in find_jobs(tmp_path / "runs")}
    assert found["tries"] == ("sweep", "interrupted", "3 of 4 runs ended")
    assert found["flow"] == ("pipeline", "finished", "published a@1")
    assert found["bad"][1] == "damaged"


@pytest.mark.parametrize("line", [b"\0\0\0\n", b'{"event": "tr\n', b"null\n", b'{"event": 3}\n'])
def test_a_damaged_journal_of_a_sweep_is_named(tmp_path, line):
    path = tmp_path / "trials.jsonl"
    path.write_bytes(b'{"event": "trial"}\n' + line)
    with pytest.raises(DamagedError, match=r"trials\.jsonl: line 2 is no event"):
        Journal(path).read(repair=True)
    path.write_bytes(b'{"event": "trial"}\n' + line[:-1])
    assert len(Journal(path).read(repair=True)) == 1


def test_a_report_is_there_from_the_first_evaluation_on_and_at_every_end(run):
    (run / "result.json").unlink()

    def stopped_after_an_evaluation() -> None:
        with live_report(run) as on_metrics:
            on_metrics([{"step": 1, "loss": 1.0}])
            assert not (run / "report.html").exists()
            assert read_status(run)["state"] == "queued"
            on_metrics([{"step": 1, "eval_loss": 1.0}])
            (run / "report.html").unlink()  # was there
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped_after_an_evaluation()
    assert "Curves" in (run / "report.html").read_text()
    assert read_status(run)["state"] == "interrupted"
    with pytest.raises(OSError, match="no room"), live_report(run):
        raise OSError("no room")
    assert (read_status(run)["state"], read_status(run)["error"]) == ("failed", "no room")
    (run / "report.html").unlink()
    drawn = CliRunner().invoke(app, ["runs", "report", "demo", "--runs-dir", str(run.parent)])
    assert drawn.output.strip() == str(run / "report.html")
    assert "Curves" in (run / "report.html").read_text()


@pytest.mark.parametrize("file", ["inputs.json", None], ids=["kept", "of an older ftray"])
@pytest.mark.parametrize("is_finished", [True, False])
def test_a_run_goes_on_with_the_contents_that_it_had(run, tmp_path, file, is_finished):
    def inputs(*, base: str = "b", train: str = "d", evaluation: str = "e") -> tuple[BaseModel, PreparedData]:
        digest = SimpleNamespace(digest=lambda: evaluation)
        return BaseModel("b", Path("b"), base), SimpleNamespace(digest=train, eval=digest)  # pyright: ignore

    write_json(run / "result.json", {"steps": 6, "data_digest": "d", "base_fingerprint": "b"})
    if not is_finished:
        (run / "result.json").unlink()
    if file is not None:
        write_json(run / file, {"base_model": "b", "data.train": "d", "data.eval": "e"})
    opened = DiskRun(config_of(tmp_path))
    check_inputs(opened, *inputs())
    with pytest.raises(UserError, match=r"data\.train: the data differ .*--fresh"):
        check_inputs(opened, *inputs(train="other"))
    if file is not None or is_finished:
        with pytest.raises(UserError, match=r"base_model: the base differs"):
            check_inputs(opened, *inputs(base="other"))
    if file is not None:
        with pytest.raises(UserError, match=r"data\.eval: the data differ"):
            check_inputs(opened, *inputs(evaluation="other"))


@pytest.mark.parametrize("count", [1, 3, [1, 2]], ids=str)
def test_a_report_of_any_number_of_workers(run, count):
    config = json.loads((run / "config.json").read_text())
    config["workers"]["count"] = count
    (run / "config.json").write_text(json.dumps(config))
    (run / "result.json").unlink()
    page = render_report(run)
    assert {"1": "1 worker ·", "3": "3 workers ·", "[1, 2]": "1 to 2 workers ·"}[str(count)] in page


def test_a_picture_that_cannot_be_drawn_ends_no_run(run, monkeypatch, caplog):
    def fail(_):
        raise TypeError("a mistake of ours")

    monkeypatch.setattr("ftray.train.runs.live_report.write_report", fail)
    with live_report(run) as on_metrics:
        on_metrics([{"step": 1, "eval_loss": 1.0}])
    assert "report.html could not be drawn: TypeError: a mistake of ours" in caplog.text
