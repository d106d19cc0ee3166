"""`ftray submit`, as a user does it who has only the client."""

import getpass
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from heads import RAY, TOKEN, head_node, last_step, plain_environment, wait_for

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def head():
    with head_node() as url:
        yield url


def test_ftray_submit_follows_stops_and_goes_on_by_name(head, tiny_model, train_file, tmp_path):
    project = tmp_path / "project"
    project.mkdir()
    (project / "run.yaml").write_text(
        f"kind: run\nname: remote\nbase_model: {tiny_model}\nmax_steps: 100000\nruns_dir: {tmp_path}/runs\n"
        f"data: {{train: {train_file}}}\nbatch: {{examples_per_step: 4}}\ncheckpoint: {{every: 100000}}\n"
    )
    run = tmp_path / "runs" / "remote"

    def ftray_submit(*words: str, **more: str) -> subprocess.Popen:
        environment = plain_environment(**TOKEN, PYTHONPATH=str(ROOT)) | more
        command = [sys.executable, "-m", "ftray", "submit", "run.yaml", *words, "--address", head]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=project, env=environment, start_new_session=True, **pipes)

    closed = ftray_submit(RAY_AUTH_TOKEN="0" * 64)
    _, err = closed.communicate(timeout=60)
    assert closed.returncode == 2, err
    assert "set RAY_AUTH_MODE=token and put the cluster's token" in err
    wrong = ftray_submit("max_stepz=3")
    assert "max_stepz" in wrong.communicate(timeout=60)[1]
    assert wrong.returncode == 2

    first = ftray_submit()
    wait_for(lambda: last_step(run) >= 3, "the job's first steps")
    first.send_signal(signal.SIGINT)
    out, err = first.communicate(timeout=60)
    assert first.returncode == 1
    assert "remote goes on without you" in err
    assert "submitted remote-" in out
    other, mine = ftray_submit("max_steps=9"), ftray_submit()
    _, err = other.communicate(timeout=60)
    assert other.returncode == 2
    assert "a job of this name runs with another config" in err
    stop = ftray_submit("--stop")
    out, err = stop.communicate(timeout=240)
    assert stop.returncode == 0, out + err
    saved = last_step(run)
    assert (run / f"checkpoints/step-{saved}/manifest.json").is_file(), "it saved before it ended"
    out, err = mine.communicate(timeout=60)
    assert mine.returncode != 0
    assert "runs already as remote-" in out
    assert f"step {saved}" in out or "stopped" in out

    again = ftray_submit()
    wait_for(lambda: last_step(run) >= saved + 2, "the steps after the stop")
    out, err = ftray_submit("--stop").communicate(timeout=240)
    out, err = again.communicate(timeout=60)
    assert f"resumes from {run}/checkpoints/step-{saved}" in out
    short = ftray_submit("name=short", "max_steps=4")
    out, err = short.communicate(timeout=240)
    assert short.returncode == 0, out + err
    assert "short: 4 steps" in out
    assert "INFO" not in err, "Ray's own notes"
    submitted = subprocess.run(
        [RAY, "job", "list", "--address", head],
        capture_output=True,
        text=True,
        env=plain_environment(**TOKEN),
        timeout=60,
    ).stdout
    for reported in ("'ftray_name': 'remote'", f"'ftray_owner': '{getpass.getuser()}'", "'ftray_kind': 'run'"):
        assert reported in submitted
    assert len(set(re.findall(r"'ftray_config': '([0-9a-f]{12})'", submitted))) == 2, "a digest of either config"
