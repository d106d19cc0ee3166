"""The files in `cluster/` as far as no cloud is needed: Ray's own validators, and that what comes up is closed."""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import jsonschema
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from ray.autoscaler._private.util import prepare_config, validate_config
from ruamel.yaml import YAML

from ftray.submit.jobs import END_S, with_time_to_end

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


# -- KubeRay ---------------------------------------------------------------------------------------------------------

KUBERAY = ROOT / "cluster/kuberay"
MANIFESTS = sorted(path for path in KUBERAY.glob("*.yaml") if path.name != "kustomization.yaml")


def documents(path: Path) -> list[dict]:
    return list(YAML(typ="safe", pure=True).load_all(path.read_text()))


@pytest.fixture(scope="module")
def crds() -> dict:
    """The schemas of KubeRay 1.7.0's own resources (Apache-2.0), without their descriptions. Kubernetes itself drops a
    field that it does not know; here it is an error, as with `kubectl --validate=strict`."""
    packed = Path(__file__).with_name("kuberay_crds_v1.7.0.json.gz")
    return strict(json.loads(gzip.decompress(packed.read_bytes())))


def strict(schema):
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: strict(value) for key, value in schema.items()}
    has_fields = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    if has_fields and "x-kubernetes-preserve-unknown-fields" not in schema:
        schema.setdefault("additionalProperties", False)
    return schema


def problems(resource: dict, crds: dict) -> list[str]:
    found = jsonschema.Draft7Validator(crds[resource["kind"]]).iter_errors(resource)
    return [f"{'/'.join(map(str, error.path))}: {error.message[:200]}" for error in found]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_kuberay_accepts_its_resources(path, crds):
    for resource in documents(path):
        if resource["apiVersion"] == "ray.io/v1":
            assert problems(resource, crds) == []


def test_a_field_that_kuberay_does_not_know_is_found(crds):
    (cluster,) = documents(KUBERAY / "cluster.yaml")
    cluster["spec"]["workerGroupSpecs"][0]["maxReplica"] = 3
    cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMount"] = []
    assert len(problems(cluster, crds)) == 2


def test_kustomize_finds_its_files():
    (kustomization,) = documents(KUBERAY / "kustomization.yaml")
    assert all((KUBERAY / name).is_file() for name in kustomization["resources"])


@pytest.mark.parametrize("name", ["cluster.yaml", "service.yaml"])
def test_clusters_on_kubernetes_come_up_closed(name):
    (resource,) = documents(KUBERAY / name)
    spec = resource["spec"].get("rayClusterConfig", resource["spec"])
    assert spec["authOptions"]["mode"] == "token"
    pods = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    for pod in (group["template"]["spec"] for group in pods):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["containers"][0]["securityContext"]["allowPrivilegeEscalation"] is False
    pins = (ROOT / "cluster/constraints.txt").read_text().splitlines()
    assert f"ray=={spec['rayVersion']}" in pins
    policies = documents(KUBERAY / "network_policies.yaml")
    assert all("Ingress" in policy["spec"]["policyTypes"] for policy in policies)


def test_what_jobs_and_the_service_run_exists():
    from ray.serve.schema import ServeDeploySchema

    from ftray.config import ServeConfig

    for path in KUBERAY.glob("job_*.yaml"):
        words = documents(path)[0]["spec"]["entrypoint"].split()
        assert (ROOT / words[1]).is_file()
        assert (ROOT / words[2]).is_file()
    (service,) = documents(KUBERAY / "service.yaml")
    deploy = YAML(typ="safe", pure=True).load(service["spec"]["serveConfigV2"])
    ServeDeploySchema.model_validate(deploy)
    config = ServeConfig.model_validate(deploy["applications"][0]["args"])
    (extras,) = re.findall(r"'\.\[(.+)\]'", DOCKERFILE.read_text())
    assert config.engine.type == "torch" or config.engine.type in extras.split(","), "the image has it"


# -- the image -------------------------------------------------------------------------------------------------------

DOCKERFILE = ROOT / "cluster/Dockerfile"


def hadolint(text: str) -> str:
    program = Path(sys.executable).with_name("hadolint")
    return subprocess.run([program, "-"], input=text, capture_output=True, text=True, check=False).stdout


def test_the_image_is_built_as_hadolint_wants_it():
    assert hadolint(DOCKERFILE.read_text()) == ""
    assert "DL3002" in hadolint(DOCKERFILE.read_text().replace("USER 1000", "USER root"))


def test_what_the_image_copies_exists():
    """From the clone; what comes from another stage is made there."""
    copies = re.findall(r"^COPY (?!--from)(?:--chown=\w+ )?(.+) \S+$", DOCKERFILE.read_text(), re.MULTILINE)
    names = [name for line in copies for name in line.split()]
    assert {"pyproject.toml", "cluster/constraints.txt", "ftray", "jobs", "configs"} <= set(names)
    assert all((ROOT / name).exists() for name in names)


# -- scripts, settings, monitoring -----------------------------------------------------------------------------------


def shellcheck(*arguments: str | Path, text: str | None = None) -> str:
    program = Path(sys.executable).with_name("shellcheck")
    return subprocess.run([program, *arguments], input=text, capture_output=True, text=True, check=False).stdout


def test_scripts_are_as_shellcheck_wants_them():
    assert shellcheck(*ROOT.glob("cluster/slurm/*"), *ROOT.glob("cluster/tls/*")) == ""
    assert "SC2086" in shellcheck("-", text="#!/bin/bash\nrm $1\n")


@pytest.mark.parametrize("path", sorted((ROOT / "cluster/network").glob("*.env")), ids=lambda path: path.stem)
def test_settings_of_networks_reach_the_workers(path, monkeypatch):
    """A shell reads them; the driver hands them on; each has a comment above it."""
    from ftray.cluster.worker_env import worker_environment

    show = f"set -a; . {path}; python3 -c 'import json, os; print(json.dumps(dict(os.environ)))'"
    done = subprocess.run(["bash", "-euc", show], capture_output=True, text=True, check=True)
    names = re.findall(r"^([A-Z_]+)=", path.read_text(), re.MULTILINE)
    read = json.loads(done.stdout)
    for name in names:
        monkeypatch.setenv(name, read[name])
    handed_on = worker_environment(8)
    assert {name: read[name] for name in names if name != "LD_LIBRARY_PATH"}.items() <= handed_on.items()


def test_dashboards_and_alerts_know_the_metrics():
    from ftray.serve.telemetry import metrics
    from ftray.train.hooks.recorder import Gauges

    dashboard = json.loads((ROOT / "cluster/grafana/ftray-training.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    variables = [v["query"]["query"] for v in dashboard["templating"]["list"] if v["type"] == "query"]
    shown = set(re.findall(r"ray_ftray_(\w+)", " ".join(queries + variables)))
    assert shown == set(Gauges.SHOWN)
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places)

    rules = load(ROOT / "cluster/prometheus/alerts.yml")["groups"]
    asked = " ".join(rule["expr"] for group in rules for rule in group["rules"])
    endings = {"counter": "_total", "histogram": "_bucket", "gauge": ""}
    of_serving = {f"{m.name}{endings[m.kind]}" for m in (*metrics.OF_REQUESTS, *metrics.OF_REPLICAS)}
    of_training = {f"ftray_{name}" for name in Gauges.SHOWN}
    assert set(re.findall(r"ray_(ftray_\w+)", asked)) <= of_serving | of_training
    assert all({"summary", "fix"} == set(rule["annotations"]) for group in rules for rule in group["rules"])


def test_ray_has_the_metrics_that_dashboards_and_alerts_ask_for():
    import ray.dashboard.modules.reporter.reporter_agent as agent

    texts = [(ROOT / "cluster" / name).read_text() for name in ("grafana/ftray-training.json", "prometheus/alerts.yml")]
    of_nodes = set(re.findall(r"ray_(node_\w+)", " ".join(texts)))
    source = Path(agent.__file__).read_text()
    assert len(of_nodes) > 6
    assert [name for name in sorted(of_nodes) if f'"{name}"' not in source] == []


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool (Debian's prometheus)")
def test_alerts_fire_when_they_should():
    for arguments in (["check", "config", "prometheus.yml"], ["test", "rules", "alerts_test.yml"]):
        command = ["promtool", *arguments]
        done = subprocess.run(command, cwd=ROOT / "cluster/prometheus", capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_jobs_upload_is_small_and_whole(tmp_path):
    """What Ray packs of a clone, by .rayignore and .gitignore."""
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    package = tmp_path / "package.zip"
    create_package(str(ROOT), package, include_gitignore=True, excludes=get_runtime_env_default_excludes())
    names = set(zipfile.ZipFile(package).namelist())
    assert {"jobs/train.py", "ftray/registry/registry.py", "configs/quickstart/data/train.jsonl"} <= names
    assert not [name for name in names if name.split("/")[0] in ("tests", "docs", ".venv", ".git", "runs")]
    assert package.stat().st_size < 3 << 20


def test_runtime_environments_are_read_and_mistakes_told(tmp_path):
    from ftray.errors import UserError
    from ftray.submit.jobs import read_runtime_env

    assert "uv" in read_runtime_env(str(ROOT / "cluster/runtime_env.yaml"))
    for text, says in (
        ("working_dir: .", "without working_dir"),
        ("[uv]", "give a mapping"),
        ("uv: {packages: 3}", "packages"),
        ("uv: [", "runtime-env"),
        ("env_vars: {A: b, WANDB_API_KEY: sentinel}", "env_vars.WANDB_API_KEY: everyone would read it"),
    ):
        path = tmp_path / "env.yaml"
        path.write_text(text)
        with pytest.raises(UserError, match=says):
            read_runtime_env(str(path))
    with pytest.raises(UserError, match="No such file"):
        read_runtime_env(str(tmp_path / "absent.yaml"))


# -- pins ------------------------------------------------------------------------------------------------------------


def pins() -> dict[str, str]:
    pinned = [line for line in (ROOT / "cluster/constraints.txt").read_text().split() if "==" in line]
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in pinned)}


def vulnerable(pinned: dict[str, str]) -> list[str]:
    known = load(ROOT / "cluster/advisories.yaml")
    return [
        f"{name} {pinned[name]}: {', '.join(entry['advisories'])}"
        for name, entry in known.items()
        if name in pinned and Version(pinned[name]) < Version(str(entry["at_least"]))
    ]


def test_no_pin_has_an_advisory_that_is_known_to_us():
    assert vulnerable(pins()) == []
    assert vulnerable(pins() | {"ray": "2.53.0"}) == ["ray 2.53.0: CVE-2025-62593, CVE-2026-27482"]


def test_every_dependency_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    unpinned = {"vllm", "liger-kernel"}  # GPUs only; vllm pins its own in an environment of its own
    extras = [line for name, lines in project["optional-dependencies"].items() for line in lines]
    wanted = {canonicalize_name(Requirement(line).name) for line in [*project["dependencies"], *extras]}
    assert wanted - set(pins()) == unpinned


@pytest.mark.parametrize("given", [None, {}, {"A": "b"}, {"A": "b", "RAY_JOB_STOP_WAIT_TIME_S": "5"}])
def test_a_job_has_time_to_end_unless_its_user_says_how_much(given):
    made = with_time_to_end({"pip": ["x"], "env_vars": given})
    assert made == {"pip": ["x"], "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(END_S)} | (given or {})}
