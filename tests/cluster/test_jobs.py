"""As a user: `ray job submit` to a head node, and Ctrl-C in the middle of `ftray train`."""

import json
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest
from heads import RAY, TOKEN, answers, free_port, head_node, last_step, plain_environment, wait_for
from tiny import write_tiny_model

from ftray.artifacts.publish import publish_adapter
from ftray.registry import Registry
from ftray.storage import read_json, verify_directory
from ftray.tracking.events import read_events
from ftray.tracking.status import RUNNING, read_status
from ftray.train.checkpoints.listing import newest_whole_checkpoint

ROOT = Path(__file__).parents[2]


PORT = free_port()


@pytest.fixture(scope="module")
def head():
    with head_node(port=PORT) as url:
        yield url


def submit(head: str, *entrypoint: str, wait: bool = True) -> subprocess.CompletedProcess:
    command = [RAY, "job", "submit", "--address", head, "--working-dir", str(ROOT)]
    command += [] if wait else ["--no-wait", "--submission-id", "serve-job"]
    environment = plain_environment(**TOKEN)
    return subprocess.run(
        [*command, "--", sys.executable, *entrypoint],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
        check=False,
    )


def test_train_job(head, tiny_model, train_file, eval_file, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"kind: run\nname: job\nbase_model: {tiny_model}\nmax_steps: 50\n"
        f"data: {{train: {train_file}, eval: {eval_file}}}\nworkers: {{count: 2}}\n"
    )
    done = submit(head, "jobs/train.py", str(config), "max_steps=4", f"runs_dir={tmp_path}/runs")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "job: 4 steps" in done.stdout
    run = tmp_path / "runs" / "job"
    assert read_json(run / "result.json")["steps"] == 4
    assert verify_directory(run / "adapter")

    # a relative runs_dir would vanish with the job: told, with exit code 2, and the job fails
    lost = submit(head, "jobs/train.py", str(config))
    assert lost.returncode != 0
    assert "runs_dir=/path/on/all/nodes" in lost.stdout

    evaluated = submit(head, "jobs/eval.py", str(config), "--adapter", str(run / "adapter"))
    assert evaluated.returncode == 0, evaluated.stdout + evaluated.stderr
    assert "exact match" in evaluated.stdout

    pipeline = tmp_path / "pipeline.yaml"
    pipeline.write_text(
        f"kind: pipeline\nname: all\ntrain: [{config}]\nrequire: [tuned.loss < 99]\npublish: {{name: support}}\n"
        f"overrides: {{max_steps: 4, runs_dir: {tmp_path}/runs, registry: {tmp_path}/registry}}\n"
    )
    piped = submit(head, "jobs/pipeline.py", str(pipeline))
    assert piped.returncode == 0, piped.stdout + piped.stderr
    assert "finished already" in piped.stdout
    assert "published support@1" in piped.stdout

    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(
        f"kind: sweep\nname: tries\nrun: {config}\nspace: {{optimizer.learning_rate: [1e-3, 5e-3]}}\n"
        f"overrides: {{max_steps: 4, runs_dir: {tmp_path}/runs, registry: {tmp_path}/registry}}\n"
        "search: {algorithm: grid}\n"
    )
    swept = submit(head, "jobs/sweep.py", str(sweep))
    assert swept.returncode == 0, swept.stdout + swept.stderr
    assert "published tries@1" in swept.stdout


def test_serve_job_ends_with_its_job(head, tmp_path, adapters):
    base = write_tiny_model(tmp_path / "base")
    registry = Registry(str(tmp_path / "registry"))
    publish_adapter(registry, "support", adapters["r4"])
    registry.promote("support@1", "prod")
    port = free_port()
    config = tmp_path / "serve.yaml"
    config.write_text(
        f"kind: serve\nbase_model: {base}\nport: {port}\nadapters: {{registry: {registry.location}}}\n"
        "engine: {context_tokens: 128, kv_cache_tokens: 1024}\n"
    )
    started = submit(head, "jobs/serve.py", str(config), wait=False)
    assert started.returncode == 0, started.stdout + started.stderr
    url = f"http://127.0.0.1:{port}"
    wait_for(lambda: answers(f"{url}/healthz"), "the endpoint")
    body = {"model": "support", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
    assert httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()["model"] == "support@1"
    stop = [RAY, "job", "stop", "--address", head, "serve-job"]
    subprocess.run(stop, capture_output=True, timeout=60, check=True, env=plain_environment(**TOKEN))
    wait_for(lambda: not answers(f"{url}/healthz"), "the endpoint to stop with its job")


def test_stopped_runs_go_on(tiny_model, train_file, tmp_path):
    """SIGTERM (as schedulers send it: twice), a closed terminal and Ctrl-C save at the next step; a second Ctrl-C ends
    at once, and the last checkpoint stands; the same command goes on after each."""
    config = tmp_path / "run.yaml"
    config.write_text(
        f"kind: run\nname: stopped\nbase_model: {tiny_model}\nmax_steps: 100000\nruns_dir: {tmp_path}/runs\n"
        f"data: {{train: {train_file}}}\nbatch: {{examples_per_step: 4}}\ncheckpoint: {{every: 100000}}\n"
    )
    run = tmp_path / "runs" / "stopped"
    ends = (
        ([signal.SIGTERM, signal.SIGTERM], 143, "SIGTERM"),
        ([signal.SIGHUP], 143, "SIGHUP"),
        ([signal.SIGINT], 1, "Ctrl-C"),
    )
    before = 0
    for numbers, exit_code, by in ends:
        out, err = signalled(config, numbers, lambda start=before: trains(run, after=start), exit_code=exit_code)
        assert before == 0 or f"resumes from {run / 'checkpoints'}/step-{before}\n" in out
        before = last_step(run)
        assert newest_whole_checkpoint(run).name == f"step-{before}", out + err
        assert read_events(run)[-1] | {"time": 0} == {"time": 0, "event": "stopped", "by": by}
        assert f"{by}: saves at the end of the step" in out
        assert (run / "report.html").is_file()
    twice = [signal.SIGINT, signal.SIGINT]
    out, err = signalled(config, twice, lambda: trains(run, after=before), exit_code=1, pause_s=0)
    assert "stopped; the checkpoint" in err
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1)), "no step is missing or doubled"


def trains(run: Path, *, after: int) -> bool:
    return last_step(run) >= after + 3 and read_status(run).get("state") == RUNNING


def signalled(
    config: Path, numbers: list[signal.Signals], when, *, exit_code: int, pause_s: float = 1
) -> tuple[str, str]:
    """Runs `ftray train`, sends it signals, and returns what it printed. Nothing of it is left soon after its end."""
    command = [str(Path(sys.executable).with_name("ftray")), "train", str(config)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=plain_environment(),
        start_new_session=True,
    )
    wait_for(when, "the steps before the signal")
    started = psutil.Process(process.pid).children(recursive=True)
    for number in numbers:
        process.send_signal(number)
        time.sleep(pause_s)
    out, err = process.communicate(timeout=90)
    assert process.returncode == exit_code, out + err
    assert "Traceback" not in err
    assert f"ftray train {config}" in err, err
    wait_for(lambda: not any(found.is_running() for found in started), "all of its processes to end", timeout_s=30)
    return out, err


BROWSER = {
    "User-Agent": "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0",
    "Origin": "https://elsewhere.example",
    "Sec-Fetch-Mode": "cors",
    "Sec-Fetch-Site": "cross-site",
}


@pytest.mark.parametrize(
    "headers", [{}, {"Authorization": f"Bearer {'0' * 64}"}, BROWSER], ids=["no", "another", "page"]
)
def test_without_the_token_nothing_is_done(head, headers):
    """The ways of CVE-2023-48022 (anyone), CVE-2025-62593 and CVE-2026-27482 (a page that somebody visits)."""
    for method, path in (("POST", "/api/jobs/"), ("DELETE", "/api/jobs/x"), ("PUT", "/api/serve/applications/")):
        assert httpx.request(method, f"{head}{path}", headers=headers, json={"entrypoint": "id"}).status_code in (
            401,
            403,
        )
    assert httpx.get(f"{head}/api/jobs/", headers=headers).status_code in (401, 403)


def test_a_driver_with_another_clusters_token_is_refused(head):
    def doctor(token: str) -> subprocess.CompletedProcess:
        command = [str(Path(sys.executable).with_name("ftray")), "doctor", "--address", f"127.0.0.1:{PORT}"]
        environment = plain_environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token)
        return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, check=False)

    refused = doctor(secrets.token_hex(32))
    assert refused.returncode == 1
    assert "set RAY_AUTH_MODE=token and put the cluster's token into" in refused.stdout, refused.stdout + refused.stderr
    assert "1 nodes with 4 CPUs" in doctor(TOKEN["RAY_AUTH_TOKEN"]).stdout


def test_a_page_is_refused_even_with_the_token(head):
    token = {"Authorization": f"Bearer {TOKEN['RAY_AUTH_TOKEN']}"}
    assert httpx.get(f"{head}/api/jobs/", headers=token).status_code == 200
    for method, path in (("POST", "/api/jobs/"), ("DELETE", "/api/jobs/x"), ("DELETE", "/api/serve/applications/")):
        answer = httpx.request(method, f"{head}{path}", headers=token | BROWSER, json={"entrypoint": "id"})
        assert answer.status_code in (403, 405), answer.text
