"""cluster/slurm/ftray.sbatch on a real Slurm: two nodes, a time limit within a run, and what a user gets wrong."""

import sys
import tempfile
from pathlib import Path

import pytest
from heads import last_step
from hosts import Cluster, can_make_hosts
from slurm import Slurm, has_slurm

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not (can_make_hosts() and has_slurm()), reason="needs root, ip netns and slurm-wlm")
STEPS = 200


@pytest.fixture(scope="module")
def slurm():
    with tempfile.TemporaryDirectory(prefix="fs") as directory:
        cluster = Cluster(Path(directory))
        slurm = Slurm(cluster, Path(directory) / "slurm")
        try:
            cluster.make_hosts(3)
            slurm.start()
            yield slurm
        finally:
            slurm.stop()
            cluster.stop()


@pytest.fixture
def project(tmp_path, tiny_model, train_file) -> Path:
    (tmp_path / "run.yaml").write_text(
        f"kind: run\nname: slurm\nbase_model: {tiny_model}\nmax_steps: {STEPS}\nruns_dir: {tmp_path}/runs\n"
        f"data: {{train: {train_file}}}\nbatch: {{examples_per_step: 4}}\ncheckpoint: {{every: 100000}}\n"
        "workers: {count: 2, cpus_each: 1}\n"
    )
    return tmp_path


OF_THE_SITE = {"FTRAY_ENV": str(Path(sys.executable).parents[1]), "FTRAY_TMP": "/tmp/ray", "PYTHONPATH": str(ROOT)}
SCRIPT = str(ROOT / "cluster/slurm/ftray.sbatch")


def log_of(project: Path, number: int) -> str:
    path = project / f"ftray-{number}.log"
    return path.read_text() if path.is_file() else ""


def test_a_run_goes_over_the_allocation_and_on_after_the_time_limit(slurm, project):
    number = slurm.submit("--nodes=2", SCRIPT, "train", "run.yaml", cwd=project, **OF_THE_SITE)
    run = project / "runs/slurm"
    slurm.wait_for(lambda: last_step(run) >= 3 or ends(slurm, number), "the first steps")
    assert last_step(run) >= 3, log_of(project, number)
    # What Slurm sends before the time limit, for --signal=B:TERM@300.
    slurm.call("scancel", "--signal=TERM", "--batch", str(number))
    slurm.wait_for(lambda: slurm.job(number).get("Restarts") == "1", "the job to be queued again")
    saved = [path.name for path in (run / "checkpoints").glob("step-*")]
    assert len(saved) == 1, "it saved before it went"
    slurm.wait_for(lambda: ends(slurm, number), "the end")
    log = log_of(project, number)
    assert slurm.job(number)["JobState"] == "COMPLETED", log
    assert f"resumes from {run}/checkpoints/{saved[0]}" in log
    assert f"slurm: {STEPS} steps" in log
    assert log.count("2 workers run on cpu") == 2, "the nodes have one CPU each"
    assert "RAY_AUTH_TOKEN" not in log
    for host in slurm.workers.values():
        assert list((slurm.cluster.directory / host.name).glob("ftray-*")) == [], "Ray's files went with the job"


def ends(slurm: Slurm, number: int) -> bool:
    return slurm.job(number).get("JobState") in ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL")


def test_a_mistake_ends_the_job_and_is_told(slurm, project):
    wrong = slurm.submit("--nodes=1", SCRIPT, "train", "run.yaml", "max_stepz=3", cwd=project, **OF_THE_SITE)
    nowhere = slurm.submit(
        "--nodes=1", SCRIPT, "train", "run.yaml", cwd=project, **OF_THE_SITE | {"FTRAY_ENV": "/nowhere"}
    )
    for number, says in ((wrong, "max_stepz"), (nowhere, "FTRAY_ENV: no ftray in /nowhere")):
        slurm.wait_for(lambda number=number: ends(slurm, number), "the end")
        job = slurm.job(number)
        assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "2:0", "0")
        assert says in log_of(project, number)


def test_a_cancelled_job_stays_ended(slurm, project):
    number = slurm.submit("--nodes=2", SCRIPT, "train", "run.yaml", "name=other", cwd=project, **OF_THE_SITE)
    slurm.wait_for(lambda: slurm.job(number)["JobState"] == "RUNNING", "the job's start")
    slurm.call("scancel", str(number))
    slurm.wait_for(lambda: ends(slurm, number), "the end")
    assert slurm.job(number)["JobState"] == "CANCELLED"
    assert slurm.job(number)["Restarts"] == "0"
