"""What needs no torch is refused before torch is imported: names, files, a run's directory and config, the cluster."""

import json
import os
import socket
import subprocess
import sys

import pytest
from filelock import FileLock
from tiny import chat_rows, write_jsonl

PROGRAM = """
import sys
from ftray.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit as ended:
    heavy = sorted({"torch", "ray", "transformers", "datasets"} & sys.modules.keys())
    print(ended.code, *heavy)
"""


@pytest.fixture
def config(tmp_path, tiny_model):
    write_jsonl(tmp_path / "rows.jsonl", chat_rows(4))
    path = tmp_path / "run.yaml"
    path.write_text(
        f"kind: run\nname: r\nbase_model: {tiny_model}\nmax_steps: 1\ndata: {{train: {tmp_path}/rows.jsonl}}\n"
        f"runs_dir: {tmp_path}/runs\n"
    )
    return path


def refused(*arguments: object, **environment: str) -> tuple[str, str]:
    """(exit code and what was imported, message)"""
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)
    return done.stdout.strip(), done.stderr


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("base_model=no-such-model", "base_model: 'no-such-model' is no embedded model"),
        ("data.train=none.jsonl", "data.train: none.jsonl: no such file"),
        ("optimizer.learning_rate=-1", "optimizer.learning_rate: -1 is refused"),
    ],
)
def test_names_and_files(config, override, message):
    code, told = refused("train", config, override)
    assert code == "2"
    assert message in told


def test_a_run_of_another_config(config, tmp_path):
    (tmp_path / "runs" / "r").mkdir(parents=True)
    (tmp_path / "runs" / "r" / "config.json").write_text(json.dumps({"seed": 7}))
    (tmp_path / "runs" / "r" / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    code, message = refused("train", config)
    assert code == "2"
    assert "holds a run of this name with another config" in message
    assert "seed: was 7, is 0" in message


def test_a_run_that_is_running(config, tmp_path):
    (tmp_path / "runs" / ".locks").mkdir(parents=True)
    with FileLock(tmp_path / "runs" / ".locks" / "r"):
        code, message = refused("train", config)
    assert code == "2"
    assert "r is running already, by another process" in message


def test_a_cluster_that_is_not_there(config):
    code, message = refused("train", config, RAY_ADDRESS="127.0.0.1:1")
    assert code == "2"
    assert "RAY_ADDRESS: 127.0.0.1:1: no Ray cluster answers there" in message


def test_a_port_that_is_taken(tmp_path, tiny_model):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        path = tmp_path / "serve.yaml"
        path.write_text(
            f"kind: serve\nbase_model: {tiny_model}\nport: {port}\nadapters: {{registry: {tmp_path}/registry}}\n"
        )
        code, message = refused("serve", path)
    assert code == "2"
    assert f"port: {port} on 127.0.0.1 is in use; choose another" in message


def test_a_plan_of_a_kept_shape_imports_no_torch(tmp_path):
    """The first counts with torch; the second reads what the first has kept, and says the same."""
    environment = os.environ | {"HF_HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", PROGRAM, "plan", "configs/run/llama31_70b_lora.yaml", "--json"]
    outputs = [
        subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout for _ in range(2)
    ]
    (plan, first), (again, second) = (output.strip().rsplit("\n", 1) for output in outputs)
    assert "torch" in first
    assert second == "0"
    assert plan == again
