"""The command line as a user meets it: one clear error with the fix, the right exit code, no traceback."""

import json
import shutil
import socket
import subprocess
import sys

import pytest
from tiny import write_jsonl

from ftray.artifacts.publish import publish_adapter
from ftray.cli.main import main
from ftray.registry import Registry
from ftray.train.runs.claim import holding, lock_of


@pytest.fixture
def run(capsys):
    def call(*arguments) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return int(ended.value.code or 0), out, err

    return call


@pytest.fixture
def config(tmp_path, tiny_model, train_file, eval_file):
    path = tmp_path / "run.yaml"
    path.write_text(
        f"kind: run\nname: demo\nbase_model: {tiny_model}\nmax_steps: 2\nruns_dir: {tmp_path}/runs\n"
        f"registry: {tmp_path}/registry\ndata: {{train: {train_file}, eval: {eval_file}}}\n"
    )
    return path


@pytest.fixture
def serve_config(tmp_path, tiny_model):
    path = tmp_path / "serve.yaml"
    path.write_text(f"kind: serve\nbase_model: {tiny_model}\nadapters: {{registry: {tmp_path}/registry}}\n")
    return path


def test_mistakes_are_told_with_the_fix_and_exit_code_2(run, config, tmp_path):
    no_answer = write_jsonl(tmp_path / "n.jsonl", [{"messages": [{"role": "user", "content": "hi"}]}])
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    (tmp_path / "file").touch()
    for override, message in {
        "learning_rate=1": "learning_rate: unknown key",
        "max_steps=two": "max_steps: 'two' is refused",
        "base_model=smolm2-135m": "is no embedded model (smollm2-135m)",
        "base_model=./none.gguf": "is no embedded model",
        f"data.train={tmp_path}/nothing.jsonl": "no such file",
        f"data.train={empty}": "the file is empty",
        f"data.train={no_answer}": "row 1: no trained token: the conversation has no assistant turn",
        "data.max_example_tokens=40": "are longer than data.max_example_tokens (40)",
    }.items():
        code, _, err = run("train", config, override, "--dry-run")
        assert (code, message in err) == (2, True), err
    code, _, err = run("train", config, f"runs_dir={tmp_path}/file/runs")
    assert (code, "cannot be written" in err) == (2, True), err
    assert not (tmp_path / "runs").exists()


def test_an_endpoint_as_a_serve_deployment(run, serve_config, tmp_path):
    from ray.serve.schema import ServeDeploySchema
    from ruamel.yaml import YAML

    from ftray.config import ServeConfig

    code, out, _ = run(
        "serve", serve_config, "--print-deploy", "adapters.host_budget=3MiB", f"tenants.database={tmp_path}/t.db"
    )
    assert code == 0
    schema = ServeDeploySchema.model_validate(YAML(typ="safe").load(out))
    (application,) = schema.applications
    assert application.import_path == "ftray.serve.app:app_of"
    again = ServeConfig.model_validate(application.args)
    assert again.adapters.host_budget == 3 * 2**20
    assert again.tenants.database == f"{tmp_path}/t.db"


def test_tenants_from_the_command_line(run, tmp_path):
    database = ("--database", tmp_path / "t.db")
    code, key, _ = run("tenants", "create", "acme", *database, "--adapters", "support", "--requests-per-minute", "60")
    assert code == 0
    assert key.startswith("ftray-")
    assert len(key.splitlines()) == 1  # so that a script can take it
    code, out, _ = run("tenants", "list", *database)
    assert "acme: support; 60 requests/min" in out
    assert f"key ...{key.strip()[-4:]} since" in out
    assert key.strip() not in out
    code, out, _ = run(
        "tenants", "set", "acme", *database, "--adapters", "all", "--requests-per-minute", "0", "--priority", "2"
    )
    assert out.strip() == "acme: every adapter; priority 2"
    assert run("tenants", "revoke", "acme", *database)[1].strip() == "acme: 1 key ended"
    code, _, err = run("tenants", "revoke", "acme", *database)
    assert (code, "no valid key" in err) == (2, True)
    code, out, _ = run("usage", *database)
    assert code == 0
    assert "tenant" in out


def test_rollout_from_the_command_line(run, adapters, tmp_path):
    registry = Registry(f"{tmp_path}/registry")
    for _ in range(3):
        publish_adapter(registry, "support", adapters["r4"])
    flag = ("--registry", registry.location)
    run("adapters", "promote", "support@1", "prod", *flag)
    assert run("adapters", "promote", "support@2", "prod", *flag, "--expected", "1")[0] == 0
    code, _, err = run("adapters", "promote", "support@3", "prod", *flag, "--expected", "1")
    assert (code, "stands at 2, expected 1" in err) == (1, True)
    _, out, _ = run("adapters", "canary", "support@prod", "3=10%", *flag)
    assert out.strip() == "support@3 gets 10% of the requests for support@prod"
    code, _, err = run("adapters", "canary", "support@prod", "3:10", *flag)
    assert (code, "VERSION=PERCENT%" in err) == (2, True)
    run("adapters", "tag", "support@3", "reviewed", *flag)
    _, out, _ = run("adapters", "list", *flag)
    assert [line.split("  ")[-1] for line in out.splitlines()][1:] == ["prod", "10% of prod, #reviewed"]
    assert run("adapters", "canary", "support@prod", "off", *flag)[0] == 0
    _, out, _ = run("adapters", "rollback", "support@prod", *flag)
    assert out.strip() == "support@prod is support@1 again (was support@2)"
    code, _, err = run("adapters", "delete", "support", *flag, "--yes")
    assert (code, "name the version itself (support@1)" in err) == (2, True)
    assert run("adapters", "delete", "support@3", *flag, "--yes")[1].strip() == "support@3 is deleted"
    assert run("adapters", "card", "support@1", *flag)[1].startswith("# support@1")


def test_a_dry_run_shows_what_would_run_and_starts_nothing(run, config, tmp_path):
    code, out, _ = run("train", config, "--dry-run", "epochs=3", "max_steps=null", "batch.examples_per_step=8")
    assert code == 0
    assert "examples_per_step: 8" in out
    assert "40 examples" in out
    assert "LoRA of rank 16" in out
    assert "15 steps of 8 examples" in out
    assert not (tmp_path / "runs").exists()
    assert "ray" not in out.lower().split()


def test_a_port_in_use(run, serve_config):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, _, err = run("serve", serve_config, f"port={taken.getsockname()[1]}")
    assert (code, "is in use; choose another with port=NUMBER" in err) == (2, True)


def test_serve_checks_preloaded_adapters_and_shows_the_plan(run, serve_config, adapters, tmp_path):
    code, _, err = run("serve", serve_config, "adapters.preload=[ghost@prod]")
    assert (code, "ghost@prod: no adapter of that name" in err) == (2, True)
    publish_adapter(Registry(f"{tmp_path}/registry"), "support", adapters["r4"])
    code, out, _ = run("serve", serve_config, "--dry-run")
    assert code == 0
    assert "support@1" in out
    preload = "adapters.preload=[support@1]"
    code, _, err = run("serve", serve_config, preload, "--dry-run")
    assert code == 0, err
    code, _, err = run("serve", serve_config, preload, "adapters.max_rank=2", "--dry-run")
    assert (code, "support@1: rank 4 is over this endpoint's adapters.max_rank (2)" in err) == (2, True)
    (damaged,) = (tmp_path / "registry").rglob("support/**/adapter_model.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:-8])
    code, _, err = run("serve", serve_config, preload, "--dry-run")
    assert (code, "support" in err) == (1, True), err


def test_an_endpoint_for_gpus_is_planned_where_there_are_none(run, serve_config):
    big = ("engine.type=vllm", "engine.tensor_parallel=4", "replicas.gpus_each=4", "replicas.max=3")
    code, out, _ = run("serve", serve_config, *big, "--dry-run")
    assert code == 0
    assert "# replicas: 1 to 3, each of 1 CPUs and 4 GPUs of one node, " in out
    assert "a placement group of 4 bundles, the base split over them" in out
    assert "# vllm is not installed here" in out
    code, _, err = run("serve", serve_config, *big)
    assert (code, "vllm is not installed; pip install" in err) == (2, True)


def test_the_life_of_an_adapter(run, adapters, tmp_path):
    flag = ("--registry", tmp_path / "registry")
    assert "has no adapters" in run("adapters", "list", *flag)[1]
    assert "published support@1" in run("adapters", "publish", adapters["r8"], "--name", "support", *flag)[1]
    assert "support@prod is support@1" in run("adapters", "promote", "support@1", "prod", *flag)[1]
    listed = run("adapters", "list", *flag)[1]
    assert listed.startswith("support@1")
    assert "rank 8" in listed
    assert listed.strip().endswith("prod")
    shown = json.loads(run("adapters", "show", "support", *flag)[1])
    assert shown["version"] == "support@1"
    assert {f["path"] for f in shown["files"]} >= {"adapter_config.json", "adapter_model.safetensors"}
    for arguments, message in {
        ("show", "suport"): "did you mean support?",
        ("promote", "support@7", "prod"): "no such version; support has 1",
        ("promote", "support@1", "Prod"): "an alias",
        ("publish", str(tmp_path / "none"), "--name", "x"): "no such directory",
        ("publish", str(tmp_path), "--name", "x"): "it is no PEFT adapter directory",
        ("publish", str(adapters["r8"]), "--name", "Bad"): "an adapter name is",
    }.items():
        code, _, err = run("adapters", *arguments, *flag)
        assert (code, message in err) == (2, True), err


def test_a_corrupt_adapter_is_refused_at_publish_and_at_use(run, adapters, tmp_path, config):
    broken = shutil.copytree(adapters["r8"], tmp_path / "broken")
    weights = broken / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    for arguments in (
        ("adapters", "publish", broken, "--name", "x", "--registry", tmp_path / "registry"),
        ("eval", config, "--adapter", broken),
    ):
        code, _, err = run(*arguments)
        assert (code, "is corrupt" in err) == (2, True), err


def test_eval_lists_the_losing_examples(run, config, adapters, tmp_path):
    out_file = tmp_path / "out.json"
    code, out, _ = run("eval", config, "--adapter", adapters["r8"], "--output", out_file)
    assert code == 0
    assert "exact match 0.0% of 10, loss " in out
    assert out.count("expected") == 10
    saved = json.loads(out_file.read_text())
    assert saved["num_examples"] == len(saved["losing"]) == 10
    base_loss = json.loads(out_file.read_text())["loss"]
    run("eval", config, "--output", out_file)
    assert json.loads(out_file.read_text())["loss"] != base_loss
    code, _, err = run("eval", config, "objective={type: text}")
    assert (code, "`ftray eval` asks questions and compares answers" in err) == (2, True)
    code, _, err = run("eval", config, "data.eval=null")
    assert (code, "data.eval: not given" in err) == (2, True)
    code, _, err = run("eval", config, "--endpoint", "http://127.0.0.1:9")
    assert (code, "does not answer" in err) == (1, True)


def test_chat_answers_in_this_process(run, adapters, tmp_path, monkeypatch, tiny_model):
    import io

    registry = Registry(f"{tmp_path}/registry")
    publish_adapter(registry, "support", adapters["r8"])
    monkeypatch.setattr("sys.stdin", io.StringIO("where is it\n\n"))
    code, out, _ = run("chat", "support@1", "--registry", registry.location, "--temperature", "0", "--max-tokens", "5")
    assert code == 0
    assert out.strip()
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
    code, _, err = run("chat", "nobody", "--registry", registry.location)
    assert (code, "no adapter of that name" in err) == (2, True)
    code, _, err = run("chat", "smollm2-135M", "--registry", registry.location)
    assert (code, "did you mean smollm2-135m?" in err) == (2, True)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    code, _, err = run("chat", "support@1", "--url", url)  # before a message is typed
    assert (code, "does not answer" in err, "Traceback" in err) == (1, True, False)


def test_usage_errors_and_version(run):
    assert run("train")[0] == 2
    assert run("trian")[0] == 2
    assert run("--version")[1].startswith("ftray ")


def test_an_unexpected_error_is_one_line_and_debug_shows_where(run, config, monkeypatch):
    def explode(*_):
        raise RuntimeError("boom")

    monkeypatch.setattr("ftray.train.prepare.check_base_name", explode)
    code, _, err = run("train", config)
    assert (code, "RuntimeError: boom (run again with --debug" in err) == (1, True)
    with pytest.raises(RuntimeError):
        main(["train", str(config), "--debug"])


def test_doctor_names_what_is_wrong(run, monkeypatch):
    code, out, _ = run("doctor")
    assert code == 0
    assert "hardware" in out
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    code, out, _ = run("doctor")
    assert code == 1
    assert "failed   ray cluster    127.0.0.1:9" in out
    assert "unset RAY_ADDRESS" in out


def test_help_needs_no_heavy_import():
    code = (
        "import sys, ftray.cli.main\n"
        "heavy = {'torch', 'ray', 'transformers', 'deepspeed', 'pandas', 'datasets', 'fastapi'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_progress_line(capsys):
    from ftray.cli.progress import TrainProgress, clock

    with TrainProgress() as progress:
        progress.on_start(0, 10)
        progress.on_metrics([{"step": 4, "loss": 1.25, "tokens_per_s": 300.4, "seconds": 2.0, "mfu": 0.31}])
        progress.on_metrics([{"step": 4, "eval_loss": 1.5}])
    out = capsys.readouterr().out
    assert "step 4/10  loss 1.2500  300 tokens/s  MFU 31%  0:12 left" in out
    assert "step 4/10  evaluation loss 1.5000" in out
    assert [clock(s) for s in (5, 65, 3700)] == ["0:05", "1:05", "1:01:40"]


def test_quickstart_outside_a_clone_says_where_to_go(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run("quickstart")
    assert (code, "at the root of a clone" in err) == (2, True)


def test_runs_are_listed_compared_and_stopped(run, tmp_path):
    def make(name: str, rate: float, *, finished: bool) -> None:
        directory = tmp_path / "runs" / name
        directory.mkdir(parents=True)
        config = {"name": name, "base_model": "tiny", "optimizer": {"learning_rate": rate, "betas": [0.9, 0.99]}}
        config |= {"tracking": {"tags": ["nightly"] if name == "fast" else []}}
        (directory / "config.json").write_text(json.dumps(config))
        steps = [{"step": s, "loss": 2.0 - rate * s, "num_tokens": 10, "seconds": 0.5} for s in (1, 2, 3)]
        lines = [*steps, {"step": 3, "eval_loss": 1.5}]
        (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if finished:
            (directory / "result.json").write_text("{}")

    flag = ("--runs-dir", tmp_path / "runs")
    assert "has no runs" in run("runs", "list", *flag)[1]
    make("slow", 0.1, finished=True)
    make("fast", 0.2, finished=False)
    listed = run("runs", "list", *flag)[1].splitlines()
    assert [line.split()[:5] for line in listed[1:]] in (
        [["fast", "interrupted", "3", "1.4000", "1.5000"], ["slow", "finished", "3", "1.7000", "1.5000"]],
        [["slow", "finished", "3", "1.7000", "1.5000"], ["fast", "interrupted", "3", "1.4000", "1.5000"]],
    )
    for words, names in (
        (("--sort", "loss"), ["fast", "slow"]),
        (("--sort", "name"), ["fast", "slow"]),
        (("--name", "s*"), ["slow"]),
        (("--status", "interrupted", "--status", "running"), ["fast"]),
        (("--tag", "nightly"), ["fast"]),
        (("--tag", "nightly", "--name", "s*"), []),
    ):
        listed = json.loads(run("runs", "list", *words, "--json", *flag)[1])
        assert [found["name"] for found in listed["runs"]] == names, words
    assert "has no such runs" in run("runs", "list", "--tag", "weekly", *flag)[1]
    out = run("runs", "compare", "slow", "fast", "--output", tmp_path / "c.html", *flag)[1]
    assert "optimizer.learning_rate                   0.1                   0.2" in out
    assert "betas" not in out
    assert (tmp_path / "c.html").read_text().count("<figure") == 2
    assert json.loads(run("runs", "show", "fast", *flag)[1])["status"] == "interrupted"
    assert "no process works on it" in run("runs", "stop", "fast", *flag)[2]
    assert not (tmp_path / "runs" / "fast" / "stop_request").exists()
    with holding(lock_of(tmp_path / "runs", "fast")):
        assert json.loads(run("runs", "show", "fast", *flag)[1])["status"] == "running"
        assert "asked to save and stop" in run("runs", "stop", "fast", *flag)[1]
    assert (tmp_path / "runs" / "fast" / "stop_request").is_file()
    assert run("runs", "stop", "slow", *flag)[::2] == (2, "error: slow: is finished; there is nothing to stop\n")
    for command in (("show", "../runs/fast"), ("stop", "../runs/fast"), ("compare", "fast", "../runs/slow")):
        code, _, err = run("runs", *command, *flag)
        assert (code, "a name is lower-case" in err) == (2, True), err
    code, _, err = run("runs", "show", "fsat", *flag)
    assert (code, "no such run" in err, "fast, slow" in err) == (2, True, True)
