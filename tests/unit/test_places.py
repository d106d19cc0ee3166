"""Paths, machines and environments as people have them: homes, brackets, pipes, proxies, IPv6, ASCII terminals, disks
that are full or another user's, and what is left behind."""

import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tiny import chat_rows, write_jsonl

from ftray.cli.main import main
from ftray.cluster import leftovers
from ftray.cluster.reaper import of_session
from ftray.config import parse_config
from ftray.data import dataset as dataset_module, tokens as tokens_module
from ftray.data.sources import check_source, load_rows
from ftray.data.tokens import tokenize_source
from ftray.doctor.checks import check_leftovers, check_proxies
from ftray.errors import ConfigError, DataError, FtrayError, UserError
from ftray.evaluate.endpoint import evaluate_endpoint
from ftray.serve.http.ports import check_port, reachable
from ftray.storage.cache import cache_directory
from ftray.storage.local_copies import describe_bytes
from ftray.storage.machine import keep_loopback_from_proxies
from ftray.submit.jobs import check_job_server
from ftray.tasks import Question
from ftray.tracking.events import SAVE_FAILED, record_event
from ftray.train.hooks.failed_saves import FailedSaves

RUN = "kind: run\nname: demo\nbase_model: {base}\ndata: {{train: {train}}}\nmax_steps: 2\n"


def run_of(base, train, *overrides):
    return parse_config(RUN.format(base=base, train=train), overrides, kind="run", source="test")


def refused(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert ended.value.code == 2
    return capsys.readouterr().err


# -- paths -----------------------------------------------------------------------------------------------------------


def test_a_home_is_expanded_and_a_variable_refused(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    run = run_of("~/base", "~/train.jsonl", "runs_dir=~/runs", "registry=~/registry")
    places = (run.base_model, run.data.train, run.runs_dir, run.registry)
    assert places == tuple(str(tmp_path / name) for name in ("base", "train.jsonl", "runs", "registry"))
    assert run_of("org/name", "s3://b/~x.jsonl").base_model == "org/name"
    for place, reason in (("$HOME/x", "variables of the environment"), ("~nobody-here/x", "no user 'nobody-here'")):
        with pytest.raises(ConfigError, match="runs_dir") as error:
            run_of("base", "train.jsonl", f"runs_dir={place}")
        assert reason in str(error.value)
    assert "variables of the environment" in refused(capsys, "adapters", "list", "--registry", "$HOME/r")


@pytest.mark.parametrize("folder", ["br [v2]", "st*ar", "q?uest", "{a,b}", "~x"])
def test_a_path_that_exists_is_that_file(tmp_path, folder):
    directory = tmp_path / folder
    directory.mkdir()
    path = write_jsonl(directory / "rows [1].jsonl", chat_rows(3))
    assert len(load_rows("data.train", str(path))) == 3


def test_pipes_and_devices_are_no_files(tmp_path):
    pipe = tmp_path / "rows.jsonl"
    os.mkfifo(pipe)
    for place in (str(pipe), "/dev/null"):
        with pytest.raises(DataError, match="is no file but a pipe or device"):
            check_source("data.train", place)


def test_sizes_have_their_unit():
    sizes = {0: "0 bytes", 2000: "2.0 KiB", 5 * 2**20: "5.0 MiB", 3 * 2**30: "3.0 GiB"}
    assert {size: describe_bytes(size) for size in sizes} == sizes


# -- what a dry run refuses -------------------------------------------------------------------------------------------


@pytest.fixture
def run_file(tmp_path, tiny_model, train_file):
    path = tmp_path / "run.yaml"
    path.write_text(RUN.format(base=tiny_model, train=train_file) + f"runs_dir: {tmp_path / 'runs'}\n")
    return path


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adapter.targets=[q_porj]", "adapter.targets: 'q_porj' matches no linear module; the model has"),
        ("adapter.targets=['(']", "is no regular expression"),
        ("workers.count=999", "workers.count: 999 workers of 1 CPU do not fit"),
        ("workers.gpus_each=1", "and 1 GPU do not fit"),
        ("runs_dir=/proc/x", "runs_dir: /proc/x cannot be written"),
    ],
)
def test_a_dry_run_refuses_what_the_run_would(run_file, capsys, monkeypatch, override, message):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray._private.utils.get_num_cpus", lambda: 4)
    assert message in refused(capsys, "train", str(run_file), "--dry-run", "zero.stage=1", override)


def test_a_dry_run_leaves_nothing(run_file, tmp_path, monkeypatch):
    monkeypatch.setattr("ray._private.utils.get_num_cpus", lambda: 4)
    with pytest.raises(SystemExit, match="0"):
        main(["train", str(run_file), "--dry-run", "adapter.targets=[q_proj]"])
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


# -- environments -----------------------------------------------------------------------------------------------------


class LoggingProxy(http.server.BaseHTTPRequestHandler):
    seen: list[str]

    def do_POST(self):
        self.seen.append(self.path)
        body = json.dumps({"choices": [{"message": {"content": "yes"}}]}).encode()
        self.send_response(200 if self.path.startswith("/") else 502)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format, *arguments): ...


@pytest.fixture
def server():
    """One that tells, by the form of the path, whether it was asked as a proxy."""
    handler = type("Handler", (LoggingProxy,), {"seen": []})
    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{made.server_port}", handler.seen
    made.shutdown()


@pytest.mark.parametrize("spared", [True, False])
def test_this_machine_is_asked_through_no_proxy(server, monkeypatch, spared):
    url, seen = server
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", url)
    monkeypatch.setenv("no_proxy", "corp.example")
    if spared:
        keep_loopback_from_proxies()
        assert os.environ["no_proxy"] == "corp.example,localhost,127.0.0.1,::1"
    question = Question([{"role": "user", "content": "secret row"}], "yes")
    if spared:
        evaluate_endpoint(url, [question], model="m", max_tokens=1)
    else:  # the twin: the proxy reads it
        with pytest.raises(FtrayError):
            evaluate_endpoint(url, [question], model="m", max_tokens=1)
    assert all(path.startswith("/") == spared for path in seen)
    assert seen


def test_doctor_tells_of_proxies(monkeypatch):
    monkeypatch.setenv("https_proxy", "http://me:secret@proxy:3128")
    (found,) = check_proxies(None)  # pyright: ignore[reportArgumentType]
    assert "https_proxy=http://***@proxy:3128" in found.text


@pytest.mark.parametrize(
    ("host", "url"), [("::1", "[::1]"), ("::", "[::1]"), ("0.0.0.0", "127.0.0.1"), ("localhost", "localhost")]
)
def test_ipv6_hosts(host, url):
    assert reachable(host) == url
    with socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        port = probe.getsockname()[1]
        probe.listen()
        if host == "::1":
            with pytest.raises(UserError, match="in use"):
                check_port(host, port)
    check_port(host, port)


def test_a_terminal_of_few_characters(tmp_path):
    command = [sys.executable, "-m", "ftray", "runs", "show", "näme", "--runs-dir", str(tmp_path / "läufe")]
    ended = subprocess.run(command, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, check=False)
    assert b"UnicodeEncodeError" not in ended.stderr
    assert b"?" in ended.stderr + ended.stdout


def test_a_home_that_cannot_be_written(monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/proc/1/no-home")
    spare = cache_directory()
    assert spare == tmp_path / f"ftray-cache-{os.getuid()}"
    assert spare.stat().st_mode & 0o777 == 0o700
    spare.chmod(0o777)  # somebody may have put something there
    with pytest.raises(UserError, match="XDG_CACHE_HOME: neither"):
        cache_directory()
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/1/none")
    with pytest.raises(UserError, match="XDG_CACHE_HOME: /proc/1/none/ftray cannot be written"):
        cache_directory()


def test_tokens_of_another_user_are_left_alone(monkeypatch, tmp_path, renderer, train_file):
    data = run_of("b", str(train_file)).data
    place = tmp_path / ".tokens"
    real = dataset_module.FileLock

    def lock(path):
        if Path(path).parent == place:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(dataset_module, "FileLock", lock)
    monkeypatch.setattr(tokens_module, "user_name", lambda: "second")
    found = tokenize_source("data.train", str(train_file), data, renderer, kept_in=place)
    assert found.directory is not None
    assert found.directory.parent == tmp_path / ".tokens-second"


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:6379", "is no URL; the job server is the dashboard's, such as http://127.0.0.1:8265"),
        ("http://127.0.0.1:1", "no job server answers there"),
    ],
)
def test_an_address_that_is_no_job_servers(address, message):
    began = time.monotonic()
    with pytest.raises(UserError, match="--address") as error:
        check_job_server(address)
    assert message in str(error.value)
    assert time.monotonic() - began < 5


# -- disks ------------------------------------------------------------------------------------------------------------


def test_failed_saves_are_shown_as_they_happen(tmp_path, monkeypatch):
    saves = FailedSaves(tmp_path)
    assert saves.poll() == []
    record_event(tmp_path, SAVE_FAILED, step=4, message="the checkpoint of step 4 could not be written")
    assert saves.poll() == ["the checkpoint of step 4 could not be written; the run goes on and tries again"]
    assert saves.poll() == []
    usage = type("Usage", (), {"free": 0})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    assert [line.partition(":")[0] for line in saves.poll()] == [f"the disk of {tmp_path} is full"]
    assert saves.poll() == []  # once


@pytest.fixture
def sessions(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    names = {
        kind: f"session_2026-01-0{day}_00-00-00_000000_{day}" for day, kind in enumerate(("old", "new", "live"), 1)
    }
    for kind, name in names.items():
        log = tmp_path / "ray" / name / "logs" / "raylet.out"
        log.parent.mkdir(parents=True)
        log.write_text("x" * 10_000)
        if kind != "new":
            for place in (log, log.parent, log.parent.parent):
                os.utime(place, (1, 1))
    return tmp_path / "ray", names


def test_what_is_old_and_nobodys_is_shown_and_removed(sessions, tmp_path, capsys, monkeypatch):
    directory, names = sessions
    monkeypatch.setattr(leftovers, "live_sessions", lambda: {names["live"]})
    tokens = tmp_path / "runs" / ".tokens" / "abc"
    tokens.mkdir(parents=True)
    os.utime(tokens, (1, 1))
    arguments = ["clean", "--runs-dir", str(tmp_path / "runs")]
    assert "--yes: there is no terminal" in refused(capsys, *arguments)
    assert tokens.is_dir()
    with pytest.raises(SystemExit, match="0"):
        main([*arguments, "--yes"])
    assert sorted(path.name for path in directory.iterdir()) == sorted([names["new"], names["live"]])
    assert not tokens.exists()
    assert "removed: 2 of them" in capsys.readouterr().out
    (found,) = check_leftovers(None)  # pyright: ignore[reportArgumentType]
    assert str(directory) in found.text


def test_a_process_that_works_in_a_session_keeps_it(sessions):
    directory, names = sessions
    command = [sys.executable, "-c", "input()", f"--session-dir={directory / names['live']}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        assert names["live"] in leftovers.live_sessions()
        process.kill()
    assert names["live"] not in leftovers.live_sessions()


DRIVER = """
import subprocess, sys, time
from ftray.cluster.session import ended_with_this_process
import os
with ended_with_this_process():
    print(os.environ["FTRAY_SESSION"], flush=True)
    subprocess.Popen(["sleep", "600"], start_new_session=True)
assert "FTRAY_SESSION" not in os.environ
time.sleep(600)
"""


def test_a_process_that_has_hidden_its_mark_is_found_by_its_files(tmp_path):
    code = "import sys; file = open(sys.argv[1], 'w'); print(flush=True); input()"
    command = [sys.executable, "-c", code, str(tmp_path / "agent.log")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert of_session("NONE=1", str(tmp_path)) == [process.pid]
        assert of_session("NONE=1", str(tmp_path / "age")) == []
        process.kill()


def test_nothing_of_a_session_outlives_a_killed_driver():
    with subprocess.Popen([sys.executable, "-c", DRIVER], stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        mark = f"FTRAY_SESSION={driver.stdout.readline().strip()}"
        deadline = time.monotonic() + 10
        while not of_session(mark) and time.monotonic() < deadline:
            time.sleep(0.05)
        (left,) = of_session(mark)
        driver.send_signal(signal.SIGKILL)
    began = time.monotonic()
    while of_session(mark) and time.monotonic() - began < 10:
        time.sleep(0.1)
    assert of_session(mark) == []
    assert not Path(f"/proc/{left}").exists() or "Z" in Path(f"/proc/{left}/stat").read_text().split()[2]
