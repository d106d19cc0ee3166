"""The files in `cluster/` as far as no cloud is needed: Ray's own validators, and that what comes up is closed."""

import os
import re
from pathlib import Path

import pytest
from ray.autoscaler._private.util import prepare_config, validate_config
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[2]
RAY_UP = sorted((ROOT / "cluster/ray_up").glob("*.yaml"))


def load(path: Path) -> dict:
    return YAML(typ="safe", pure=True).load(path.read_text())


@pytest.mark.parametrize("path", RAY_UP, ids=lambda path: path.stem)
def test_ray_accepts_it(path):
    validate_config(prepare_config(load(path)))


def test_ray_refuses_a_key_that_it_does_not_know():
    with pytest.raises(Exception, match="Additional properties"):
        validate_config(prepare_config(load(RAY_UP[0]) | {"max_worker": 3}))


@pytest.mark.parametrize("path", RAY_UP, ids=lambda path: path.stem)
def test_it_comes_up_closed(path):
    config = prepare_config(load(path))
    starts = [line for key in ("head", "worker") for line in config[f"{key}_start_ray_commands"] if "ray start" in line]
    assert len(starts) == 2
    assert all(re.match(r"\. ~/\.profile; ", line) for line in starts), "the mode stands there"
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert not any("0.0.0.0" in line for line in starts)
    assert any("RAY_AUTH_MODE=token" in line for line in config["setup_commands"])
    assert "~/.ray/auth_token" in config["file_mounts"] or os.path.expanduser("~/.ray/auth_token") in str(
        config["file_mounts"]
    )


@pytest.mark.parametrize("path", RAY_UP, ids=lambda path: path.stem)
def test_what_is_installed_is_pinned(path):
    installs = [line for line in load(path)["setup_commands"] if "pip install" in line and "ftray" in line]
    assert len(installs) == 1
    assert "-c ~/ftray/cluster/constraints.txt" in installs[0]


@pytest.mark.parametrize("path", [p for p in RAY_UP if p.stem != "on_premise"], ids=lambda path: path.stem)
def test_the_head_has_no_gpu_and_workers_come_and_go(path):
    types = load(path)["available_node_types"]
    assert types["head"]["resources"]["GPU"] == 0
    assert types["gpu_worker"]["min_workers"] == 0 < types["gpu_worker"]["max_workers"]
    assert re.search("spot", str(types["gpu_worker"]), re.IGNORECASE)
