"""Shared fixtures. What they are made from is in tiny.py."""

import logging
import os
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tests have more processes than there are cores: a thread that spins until its neighbours come to the barrier keeps
# them from it (three processes side by side took four times the time).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
from tiny import chat_rows, write_jsonl, write_peft_adapter, write_tiny_model
from warm_ray import warm_python


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_base(tiny_model):
    from ftray.model.base import prepare_base

    return prepare_base(str(tiny_model))


@pytest.fixture(scope="session")
def renderer(tiny_base):
    from ftray.model.base import load_tokenizer
    from ftray.model.chat import ChatRenderer

    return ChatRenderer(load_tokenizer(tiny_base))


@pytest.fixture(scope="session")
def adapters(tmp_path_factory, tiny_model) -> dict[str, Path]:
    """Seven peft adapters of mixed rank, three of them alike, one on two kinds of module only, one on one."""
    root = tmp_path_factory.mktemp("adapters")
    made = {f"r{rank}": write_peft_adapter(root / f"r{rank}", tiny_model, rank=rank, seed=rank) for rank in (4, 8, 16)}
    made["qv"] = write_peft_adapter(root / "qv", tiny_model, rank=8, seed=99, targets=["q_proj", "v_proj"])
    for seed, name in enumerate(("r4b", "r4c"), start=50):
        made[name] = write_peft_adapter(root / name, tiny_model, rank=4, seed=seed)
    made["up"] = write_peft_adapter(root / "up", tiny_model, rank=8, seed=98, targets=["up_proj"])
    return made


@pytest.fixture(scope="session")
def train_file(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "train.jsonl", chat_rows(40))


@pytest.fixture(scope="session")
def eval_file(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "eval.jsonl", chat_rows(10, seed=1))


@pytest.fixture(scope="session")
def serve_port() -> int:
    """One for all endpoints of the Ray session: Serve goes on listening where it was first told to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def ray_session():
    """One Ray session for all tests, with more CPUs than the machine has: the workers are tiny."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "1"
    import ray

    from ftray.cluster.session import on_loopback, own_address

    settings = {"metrics_report_interval_ms": 1000}
    how = {"logging_level": logging.ERROR, "log_to_driver": False, "_system_config": settings}
    with warm_python() as python, pytest.MonkeyPatch.context() as patch:
        patch.setattr("ftray.child_process.sys", SimpleNamespace(executable=python, path=sys.path))
        with on_loopback(), own_address(), pytest.MonkeyPatch.context() as starting:  # as `start_ray` does
            starting.setattr(sys, "executable", python)
            ray.init(address="local", num_cpus=4, **how)
        yield ray
        ray.shutdown()
