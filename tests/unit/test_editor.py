"""Schemas for editors are those of the code, and what `ftray init` writes can be used as it is."""

import json
from pathlib import Path

import jsonschema
import pytest
from ruamel.yaml import YAML

from ftray.cli.main import main
from ftray.config import load_config, load_sweep
from ftray.config.editor import SCHEMAS, dotted_keys, json_schema
from ftray.config.load import KINDS
from ftray.config.run import RunConfig

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def problems(path: Path, **changes: object) -> list[str]:
    tree = YAML(typ="safe", pure=True).load(path.read_text()) | changes
    return [error.message for error in jsonschema.Draft7Validator(json_schema(tree["kind"])).iter_errors(tree)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_shipped_schemas_are_current(kind):
    """`python -m ftray.config.editor` writes them anew."""
    assert json.loads((SCHEMAS / f"{kind}.json").read_text()) == json_schema(kind)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_config_fits_its_schema(path):
    assert problems(path) == []


def test_what_the_loader_refuses_the_editor_marks():
    run, sweep = ROOT / "configs/run/support_intents.yaml", ROOT / "configs/sweep/rank_and_rate.yaml"
    assert "'epoch' was unexpected" in problems(run, epoch=2)[0]
    assert problems(run, batch={"examples_per_step": 0}) != []
    assert problems(run, objective={"type": "dpo", "beta": "much"}) != []
    assert problems(sweep, space={"optimizer.learning_rat": [1e-3]}) != []
    assert problems(sweep, space={"optimizer.learning_rate": {"log_unifrom": [1e-4, 1e-3]}}) != []
    assert problems(sweep, space={"variables.rate": {"uniform": [0, 1]}}) == []
    assert problems(ROOT / "configs/serve/support.yaml", adapters={"registry": "r", "host_budget": 5}) != []


def test_keys_of_sections_are_known_by_their_dotted_names():
    keys = dotted_keys(RunConfig)
    assert {"adapter", "adapter.rank", "optimizer.learning_rate", "data.train", "objective.beta"} <= set(keys)


def test_fields_are_described_by_their_comments():
    assert json_schema("run")["$defs"]["AdapterConfig"]["properties"]["quantize_base"]["description"].startswith(
        "QLoRA"
    )


def test_a_starter_project_loads_as_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="0"):
        main(["init", "project"])
    monkeypatch.chdir(tmp_path / "project")
    run = load_config("run.yaml", kind="run")
    assert Path(run.data.train).is_file()
    load_config("serve.yaml", kind="serve")
    assert len(list(load_sweep("sweep.yaml")[1].grid())) == 6
    assert load_config("pipeline.yaml", kind="pipeline").train == ["run.yaml"]
    for name in ("run", "sweep", "serve", "pipeline"):
        first = Path(f"{name}.yaml").read_text().splitlines()[0]
        assert Path(first.partition("$schema=")[2]).is_file()
    assert "/runs/" in Path(".gitignore").read_text()
    Path("run.yaml").write_text("mine\n")
    Path("serve.yaml").unlink()
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        main(["init"])
    assert "is there already, and nothing was written" in capsys.readouterr().err
    assert Path("run.yaml").read_text() == "mine\n"
    assert not Path("serve.yaml").exists()
