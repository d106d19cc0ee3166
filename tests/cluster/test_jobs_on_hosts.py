"""`ftray submit` and `ftray doctor` on a cluster of hosts, as a user on the head does it: a run over two hosts whose
driver dies, a sweep, an endpoint; a link that is slow and one that is closed."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hosts import BIN, PORT, Cluster, can_make_hosts, ip, running_cluster
from tiny import write_tiny_model

from ftray.artifacts.publish import publish_adapter
from ftray.registry import Registry
from ftray.storage import read_json
from ftray.tracking.events import read_events
from ftray.tracking.metrics import read_metrics

pytestmark = pytest.mark.skipif(not can_make_hosts(), reason="needs root and `ip` to make network namespaces")
ROOT = Path(__file__).parents[2]
HOLD = """
import time
from pathlib import Path

from ftray.objectives import Objective, sft_loss
from ftray.schema import Strict


class Held(Strict):
    type: str
    held_by: str  # a file: while it is there, a step takes long


def make_loss(config):
    def loss(log_probs, row):
        if Path(config.held_by).exists():
            time.sleep(0.2)
        return sft_loss(log_probs, row)

    return loss


HELD = Objective(Held, make_loss, shape="conversation")
"""


@pytest.fixture(scope="module")
def cluster():
    with running_cluster(num_workers=2) as cluster:
        yield cluster


@pytest.fixture
def project(tmp_path, tiny_model, train_file, eval_file) -> Path:
    path = tmp_path / "project"
    path.mkdir()
    (path / "run.yaml").write_text(
        f"kind: run\nname: job\nbase_model: {tiny_model}\nmax_steps: 160\nruns_dir: {tmp_path}/runs\n"
        f"data: {{train: {train_file}, eval: {eval_file}}}\nworkers: {{count: 2}}\n"
        f"batch: {{examples_per_step: 4}}\ncheckpoint: {{every: 20}}\nregistry: {tmp_path}/registry\n"
        f"objective: {{type: 'hold:HELD', held_by: {tmp_path}/held}}\n"
    )
    (path / "hold.py").write_text(HOLD)
    (path / "sweep.yaml").write_text(
        "kind: sweep\nname: tries\nrun: run.yaml\nspace: {optimizer.learning_rate: [1e-3, 5e-3]}\n"
        "overrides: {max_steps: 4, workers.count: 1}\nsearch: {algorithm: grid, fused: off}\n"
    )
    return path


def client(cluster: Cluster, project: Path, *words: str) -> subprocess.Popen:
    """Of the cluster it knows the job server's address and the token."""
    command = [str(BIN / "ftray"), "submit", *words, "--address", "http://127.0.0.1:8265"]
    environment = cluster.environment() | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        cluster.on(cluster.head, *command),
        cwd=project,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def ended(process: subprocess.Popen, code: int = 0, *, timeout_s: float = 240) -> str:
    out, _ = process.communicate(timeout=timeout_s)
    assert process.returncode == code, out
    return out


def wait_for(condition, process: subprocess.Popen, *, timeout_s: float = 120):
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if found := condition():
            return found
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.2)
    process.kill()
    raise AssertionError(f"waited in vain: {process.communicate(timeout=60)[0]}")


def test_a_run_that_was_stopped_goes_on_and_outlives_its_driver(cluster, project):
    """Its objective is the user's own, from the upload, and holds it while the test looks on."""
    held = project.parent / "held"
    held.touch()
    process = client(cluster, project, "run.yaml")
    run = project.parent / "runs/job"
    wait_for(lambda: newest(run), process)
    ended(client(cluster, project, "run.yaml", "--stop"))
    process.communicate(timeout=60)
    assert process.returncode != 0
    saved = newest(run)
    process = client(cluster, project, "run.yaml")
    wait_for(lambda: newest(run) > saved, process)
    drivers = [pid for pid in cluster.processes_on(cluster.head) if is_driver(pid)]
    assert len(drivers) == 1
    os.kill(drivers[0], signal.SIGKILL)
    held.unlink()
    out = ended(process)
    assert "the driver died of SIGKILL; starts again" in out
    assert f"resumes from {run}/checkpoints/step-{saved}\n" in out
    assert out.count(f"resumes from {run}/checkpoints/step-") == 2
    assert "job: 160 steps" in out
    assert read_json(run / "result.json")["steps"] == 160
    assert [r["step"] for r in read_metrics(run) if "loss" in r] == list(range(1, 161))
    workers = [event["workers"] for event in read_events(run) if event["event"] == "workers_started"]
    assert workers[-1] == 2


def newest(run: Path) -> int:
    """Step of the newest whole checkpoint; 0: none."""
    return max((int(p.parent.name[5:]) for p in (run / "checkpoints").glob("step-*/manifest.json")), default=0)


def is_driver(pid: int) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:  # it has ended
        return False
    return b"-m" in words and b"ftray" in words and b"train" in words and b"ftray.submit.supervise" not in words


def test_a_sweep(cluster, project):
    out = ended(client(cluster, project, "sweep.yaml"))
    assert (project.parent / "runs/tries/sweep.html").is_file(), out
    assert "tries" in out


def test_an_endpoint_lives_as_long_as_its_job(cluster, project, adapters):
    base = write_tiny_model(project / "base")
    registry = Registry(str(project.parent / "registry"))
    publish_adapter(registry, "support", adapters["r4"])
    registry.promote("support@1", "prod")
    (project / "serve.yaml").write_text(
        f"kind: serve\nbase_model: {base}\nport: 8100\nadapters: {{registry: {registry.location}}}\n"
        "engine: {context_tokens: 128, kv_cache_tokens: 1024}\n"
    )
    process = client(cluster, project, "serve.yaml")
    body = {"model": "support", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
    wait_for(lambda: "support@1" in ask(cluster, "/v1/chat/completions", body), process)
    ended(client(cluster, project, "serve.yaml", "--stop"))
    assert "\nstopping\n" in process.communicate(timeout=60)[0]
    assert "support@1" not in ask(cluster, "/v1/chat/completions", body)


def ask(cluster: Cluster, path: str, body: dict) -> str:
    words = ["curl", "--silent", "--max-time", "20", "-H", "Content-Type: application/json", "-d", json.dumps(body)]
    done = subprocess.run(
        cluster.on(cluster.head, *words, f"http://127.0.0.1:8100{path}"), capture_output=True, text=True, check=False
    )
    return done.stdout


def test_base_data_and_run_directory_lie_in_an_object_store(cluster, project, tiny_model, train_file, eval_file):
    """The base is read once and passed on from node to node; the nodes share no disk. A driver that dies goes on."""
    store = f"http://{cluster.head.address}:5000"
    for_s3 = {
        "AWS_ENDPOINT_URL": store,
        "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
    }

    def of_s3(*command: str) -> list[str]:
        return cluster.on(cluster.head, "env", *(f"{key}={value}" for key, value in for_s3.items()), *command)

    log = (project / "requests.log").open("wb")
    serve = cluster.on(cluster.head, sys.executable, "-m", "moto.server", "-H", cluster.head.address, "-p", "5000")
    server = subprocess.Popen(serve, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    # The tiny model is the same in every session; a copy in this user's cache would be none that is made here.
    name = f"tiny-{os.getpid()}"
    try:
        put = ["curl", "--silent", "--fail", "--retry", "20", "--retry-connrefused", "-X", "PUT", f"{store}/bucket"]
        subprocess.run(cluster.on(cluster.head, *put), check=True, capture_output=True)
        objects = {f"{name}/{file.name}": file for file in tiny_model.iterdir()}
        objects |= {"data/train.jsonl": train_file, "data/eval.jsonl": eval_file}
        for key, file in objects.items():
            body = [f"{put[-1]}/{key}", "--data-binary", f"@{file}"]
            body += ["-H", "Expect:", "-H", "Content-Type: application/octet-stream"]
            subprocess.run(cluster.on(cluster.head, *put[:-1], *body), check=True, capture_output=True)
        words = [
            str(BIN / "ftray"),
            "train",
            "run.yaml",
            "name=stored",
            "max_steps=60",
            f"base_model=s3://bucket/{name}",
            f"runs_dir=s3://bucket/{name}-runs",
            "data.train=s3://bucket/data/train.jsonl",
            "data.eval=s3://bucket/data/eval.jsonl",
        ]
        environment = cluster.environment() | {"RAY_ADDRESS": f"{cluster.head.address}:{PORT}"}

        def start() -> subprocess.Popen:
            out = subprocess.PIPE
            return subprocess.Popen(
                of_s3(*words), cwd=project, env=environment, stdout=out, stderr=subprocess.STDOUT, text=True
            )

        process = start()
        checkpoints = (
            f"{name}-runs/stored/checkpoints/"  # an adapter has a manifest of its own, before the checkpoint's
        )
        whole = re.compile(rf"{checkpoints}step-\d+/manifest\.json")
        wait_for(lambda: whole.search(stored(cluster, store, checkpoints)), process)
        process.kill()  # `ip` and `env` have become the driver
        out = process.communicate(timeout=60)[0]
        assert f"s3://bucket/{name} goes to 2 nodes, from node to node" in out
        out = ended(start())
        assert f"resumes from s3://bucket/{name}-runs/stored/checkpoints/step-" in out
        assert "stored: 60 steps" in out
        keys = stored(cluster, store, f"{name}-runs/stored/")
        assert "adapter/adapter_model.safetensors" in keys
        assert "result.json" in keys
        show = [str(BIN / "ftray"), "runs", "show", "stored", "--runs-dir", f"s3://bucket/{name}-runs"]
        shown = subprocess.run(of_s3(*show), env=environment, check=True, capture_output=True, text=True).stdout
        described = json.loads(shown)
        assert (described["status"], described["steps"], described["result"]["steps"]) == ("finished", 60, 60)
        assert [event["event"] for event in described["events"]] == ["workers_started", "workers_started"]
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=20)
        log.close()
        for left in (Path.home() / ".cache/ftray/copies").glob(f"{name}-*"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    lines = (project / "requests.log").read_text().splitlines()
    assert len([line for line in lines if f"GET /bucket/{name}/model.safetensors" in line]) == 1
    for host in cluster.hosts[1:]:
        copies = list((cluster.directory / host.name / "cache/ftray/copies").glob(f"{name}-*/model.safetensors"))
        assert [path.read_bytes() for path in copies] == [(tiny_model / "model.safetensors").read_bytes()]


def stored(cluster: Cluster, store: str, prefix: str) -> str:
    """The store's list of keys, as it answers it."""
    listing = ["curl", "--silent", f"{store}/bucket?list-type=2&prefix={prefix}"]
    return subprocess.run(cluster.on(cluster.head, *listing), check=True, capture_output=True, text=True).stdout


def doctor(cluster: Cluster, *words: str) -> tuple[list[dict], int]:
    process = cluster.run(
        str(BIN / "ftray"), "doctor", "--json", *words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    out, err = process.communicate(timeout=120)
    assert "Traceback" not in err, err
    return json.loads(out), process.returncode


def test_the_doctor_of_a_cluster_names_what_is_wrong(cluster, tmp_path):
    """The nodes share this machine's disks and packages; what of them can be wrong is in tests/unit/test_doctor.py."""
    found, code = doctor(cluster, "--shared", str(tmp_path))
    assert code == 0, found
    by_subject = {finding["subject"]: finding for finding in found}
    assert "3 nodes with 2 CPUs" in by_subject["ray cluster"]["text"]
    assert "closed by a token" in by_subject["nodes"]["text"]
    assert by_subject["shared storage"]["level"] == "ok"
    assert "6 links over TCP" in by_subject["bandwidth"]["text"]
    assert not [finding for finding in found if finding["subject"] == "link"]
    assert len({finding["node"] for finding in found} - {""}) == 3

    one, two = cluster.hosts[1:]
    ip("-n", one.name, "route", "add", "unreachable", f"{two.address}/32")
    # The head's own link; the workers' way to the head is not touched.
    shape = ["tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", "20mbit", "burst", "32kbit", "latency", "50ms"]
    subprocess.run(["ip", "netns", "exec", cluster.head.name, *shape], check=True)
    try:
        found, code = doctor(cluster, "--shared", str(cluster.small_disk / "absent"))
        assert code == 1
        assert [f["level"] for f in found if f["subject"] == "shared storage"] == ["failed"]
        found, code = doctor(cluster)
    finally:
        ip("-n", one.name, "route", "del", "unreachable", f"{two.address}/32")
        subprocess.run(
            ["ip", "netns", "exec", cluster.head.name, "tc", "qdisc", "del", "dev", "eth0", "root"], check=True
        )
    assert code == 1
    links = [(finding["level"], finding["text"]) for finding in found if finding["subject"] == "link"]
    closed = [text for level, text in links if level == "failed"]
    assert any(text.startswith(f"{one.address} does not reach {two.address}") for text in closed), links
    slow = [text for level, text in links if level == "warning"]
    assert slow, found
    assert all(text.startswith(f"{cluster.head.address} -> ") for text in slow), links
