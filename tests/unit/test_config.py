import re
import subprocess
import sys
from pathlib import Path

import pytest

from ftray.config import RunConfig, ServeConfig, load_config, load_sweep, parse_config, to_yaml
from ftray.config.load import models_in
from ftray.config.renamed import HERE, RenamedWarning
from ftray.errors import ConfigError
from ftray.train.advice import advise
from ftray.train.runs.claim import config_changes

ROOT = Path(__file__).parents[2]
GOOD = "kind: run\nname: a\nbase_model: smollm2-135m\nepochs: 1\ndata: {train: x.jsonl}\n"


def problems(text: str, overrides=(), kind="run") -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, overrides, kind=kind, source="x.yaml")
    return caught.value.problems


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/**/*.yaml")), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_shipped_config_loads(path, monkeypatch):
    kind = next(line.split()[1] for line in path.read_text().splitlines() if line.startswith("kind:"))
    if kind == "sweep":
        monkeypatch.chdir(ROOT)  # it names its run file from there
        assert list(load_sweep(path)[1].free)
    config = load_config(path, kind=kind)
    assert parse_config(to_yaml(config), kind=kind, source="again") == config if kind == "run" else config


def test_old_names_are_read_with_a_line_that_says_so():
    text = GOOD + "memory: {compile: true}\nobjective: {type: domain}\n"
    with pytest.warns(RenamedWarning) as told:
        old = parse_config(text, kind="run", source="x.yaml")
    new = parse_config(GOOD + "compile: true\nobjective: {type: text}\n", kind="run", source="x.yaml")
    assert old == new
    assert (new.compile, new.objective.type) == (True, "text")
    assert sorted(str(warning.message) for warning in told) == [
        "x.yaml: memory.compile is called compile now; the old name is read until ftray 0.3",
        "x.yaml: objective.type: domain is called text now; the old name is read until ftray 0.3",
    ]


@pytest.mark.parametrize(
    ("file", "override"),
    [("compile: auto\n", "memory.compile=true"), ("memory: {compile: auto}\n", "compile=true")],
)
def test_an_override_replaces_the_files_value_by_either_name(file, override):
    with pytest.warns(RenamedWarning, match="memory.compile is called compile now"):
        assert parse_config(GOOD + file, [override], kind="run", source="x.yaml").compile is True


def test_an_old_value_in_an_override_is_told():
    with pytest.warns(RenamedWarning, match="objective.type: domain is called text now"):
        config = parse_config(GOOD, ["objective.type=domain"], kind="run", source="x.yaml")
    assert config.objective.type == "text"


def test_both_names_are_refused():
    found = problems(GOOD + "compile: auto\nmemory: {compile: true}\n")
    assert found == ["memory.compile is called compile now, and both are given; leave memory.compile out"]


def test_a_run_that_began_under_old_names_goes_on():
    config = parse_config(GOOD + "compile: true\nobjective: {type: text}\n", kind="run", source="x.yaml")
    kept = config.model_dump(mode="json")
    kept["memory"]["compile"] = kept.pop("compile")
    kept["objective"]["type"] = "domain"
    assert config_changes(kept, config.model_dump(mode="json")) == ([], [])
    kept["memory"]["compile"] = False
    assert config_changes(kept, config.model_dump(mode="json"))[0] == ["compile: was false, is true"]


def test_a_run_that_began_before_a_key_was_there_goes_on():
    """It did what the default says; another value is another run."""
    config = parse_config(GOOD, kind="run", source="x.yaml")
    kept = config.model_dump(mode="json")
    for key in ("bad_rows", "split", "subset"):
        del kept["data"][key]
    del kept["chat"], kept["objective"]["train_on"]
    assert config_changes(kept, config.model_dump(mode="json")) == ([], [])
    last = parse_config(GOOD, ["objective={type: sft, train_on: last}"], kind="run", source="x.yaml")
    assert config_changes(kept, last.model_dump(mode="json"))[0] == ['objective.train_on: was "all", is "last"']


@pytest.mark.parametrize("overrides", ["{memory.compile: true}", "{memory: {compile: true}}"])
def test_a_sweeps_override_by_an_old_name_replaces_the_runs(tmp_path, overrides):
    (tmp_path / "run.yaml").write_text(GOOD + "compile: auto\n")
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(
        f"kind: sweep\nname: s\nrun: {tmp_path}/run.yaml\noverrides: {overrides}\n"
        "space: {optimizer.learning_rate: [1e-3]}\nsearch: {algorithm: grid, metric: loss}\n"
    )
    with pytest.warns(RenamedWarning, match="memory.compile is called compile now"):
        assert load_sweep(sweep)[1].first_run(load_sweep(sweep)[0]).compile is True


def test_a_sweep_over_an_old_name(tmp_path):
    (tmp_path / "run.yaml").write_text(GOOD)
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(
        f"kind: sweep\nname: s\nrun: {tmp_path}/run.yaml\nspace: {{memory.compile: [true, false]}}\n"
        "search: {algorithm: grid, metric: loss}\n"
    )
    with pytest.warns(RenamedWarning, match="memory.compile is called compile now"):
        assert list(load_sweep(sweep)[1].free) == ["compile"]


def test_every_problem_is_in_one_report():
    text = GOOD.replace("train:", "trian:").replace("epochs: 1", "epochs: two") + "zero: {stage: 7}\n"
    found = "\n".join(problems(text, ["optimizer.learning_rat=1e-4", "nonsense"]))
    for part in (
        "data.trian: unknown key; did you mean 'train'?",
        "data.train: required",
        "epochs: 'two' is refused",
        "zero.stage: 7 is refused: Input should be 0, 1, 2 or 3",
        "optimizer.learning_rat: unknown key; did you mean 'learning_rate'?",
        "'nonsense': write it as key.path=value",
    ):
        assert part in found


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("name=Bad Name", "a name is lower-case"),
        ("epochs=null", "give either `epochs` or `max_steps`"),
        ("data.max_example_tokens=9999", "must be at most batch.tokens_per_micro_batch"),
        ("data.max_example_tokens=4096 objective.type=dpo", "twice data.max_example_tokens (a pair) is 8192"),
        ("memory.sequence_parallel=2", "memory.sequence_parallel: 2 must divide workers.count (1), a fixed number"),
        ("memory.sequence_parallel=2 workers.count=[2,4]", "a fixed number"),
        ("workers.count=[4, 2]", "workers.count: [4, 2] is refused: give one number from 1 on, or [min, max]"),
        ("workers.count=[2]", "workers.count: [2] is refused: give one number"),
        ("workers.count=0", "workers.count: 0 is refused: give one number"),
        ("memory.liger_kernels=true", "memory.liger_kernels: they run on GPUs only"),
        ("evaluation.samples=3", "evaluation.samples: there is no data.eval"),
        ("data.overlong=trunc", "did you mean 'truncate'?"),
        ("adapter.rank='16'", "should be a valid integer"),
        ("optimizer.learning_rate=-1", "should be greater than 0"),
        ("optimizer.learning_rate=.nan", "should be a finite number"),
        ("data.columns={prompt: a}", "`prompt` and `completion` go together"),
        ("objective.typ=dpo", "objective: type is required, but not given"),
        (
            "objective.type=dop",
            "objective.type: 'dop' is refused: Input should be 'sft', 'text', 'dpo', 'module:NAME'; did you mean",
        ),
        ("objective={type: dpo, betta: 0.1}", "objective.betta: unknown key; did you mean 'beta'?"),
        ("objective={type: dpo, beta: -1}", "objective.beta: -1 is refused: Input should be greater than 0"),
        (
            "objective={type: sft, beta: 0.1}",
            "objective.beta: unknown key; known keys here: train_on, train_reasoning",
        ),
        ("data.overlong=split", "split is for documents (objective text), not sft"),
        ("data.columns={chosen: a}", "`chosen` and `rejected` go together"),
        ("data.columns={text: a, system: b}", "`text` stands alone"),
        ("adapter={initialization: pissa, variant: dora}", "pissa does not go with variant dora"),
        ("zero={stage: 0, offload: cpu}", "offload needs a stage of 1, 2 or 3"),
        ("zero.settings={stage: 1}", "settings: stage is set by ftray"),
        ("optimizer.lora_plus_ratio=0.5", "greater than or equal to 1"),
        ("kind=serve", "this is a file for `ftray serve`"),
        ("name.x=1", "name is a value, not a section"),
    ],
)
def test_one_mistake_one_clear_problem(override, message):
    assert any(message in problem for problem in problems(GOOD, re.split(r" (?=[a-z]+\.)", override)))


@pytest.mark.parametrize("key", sorted(HERE))
def test_keys_of_other_tools_are_answered_with_ours(key):
    """And ours exist."""
    (found,) = problems(GOOD, [f"{key}=1"])
    assert f"{key}: unknown key; what other tools call so is here {HERE[key]}" in found
    for section, name in re.findall(r"\b([a-z_]+)\.([a-z_0-9]+)\b", HERE[key]):
        (model,) = models_in(RunConfig.model_fields[section].annotation)
        assert name in model.model_fields


def test_a_file_of_another_kind_is_that_alone():
    assert problems(GOOD, ["kind=serve"]) == ["kind: 'serve' must be 'run'; this is a file for `ftray serve`"]


def test_yaml_1_2_and_overrides():
    config: RunConfig = parse_config(
        GOOD, ["optimizer.learning_rate=2e-4", "adapter=null", "data.eval=no"], kind="run", source="x"
    )
    assert config.optimizer.learning_rate == 2e-4
    assert config.adapter is None
    assert config.data.eval == "no"  # YAML 1.1 would make it False


def test_a_duplicate_key_and_broken_yaml_name_their_line():
    assert "line 6" in problems(GOOD + "name: b\n")[0]
    assert "line 2" in problems("kind: run\n : :\n  - [")[0] or "not valid YAML" in problems("kind: run\na: [")[0]


def test_sizes_need_a_unit():
    text = "kind: serve\nbase_model: m\nadapters: {host_budget: %s}\n"
    config: ServeConfig = parse_config(text % "1.5GiB", kind="serve", source="x")
    assert config.adapters.host_budget == 3 * 2**29
    assert "such as 2GiB" in problems(text % "100", kind="serve")[0]


def test_a_config_cannot_be_changed_after_loading():
    config: RunConfig = parse_config(GOOD, kind="run", source="x")
    with pytest.raises(Exception, match="frozen"):
        config.name = "b"  # pyright: ignore


def test_missing_file_suggests_a_near_one(tmp_path):
    (tmp_path / "run.yaml").write_text(GOOD)
    with pytest.raises(ConfigError, match=r"did you mean .*run\.yaml"):
        load_config(tmp_path / "rum.yaml", kind="run")


def test_a_bad_file_is_answered_without_torch_or_ray(tmp_path):
    (tmp_path / "bad.yaml").write_text("kind: run\nnam: x\n")
    code = (
        "import sys\nfrom ftray.cli.main import main\n"
        "try: main(['train', sys.argv[1]])\n"
        "except SystemExit as e: print(e.code, sorted({'torch','ray','transformers','deepspeed'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "bad.yaml")], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "2 []"
    assert "did you mean 'name'?" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["adapter.variant=dora", "zero.stage=3"], "adapter.variant: dora needs whole base weights"),
        (["adapter.quantize_base=nf4", "zero.stage=3"], "adapter.quantize_base: nf4 needs whole base weights"),
        (["adapter=null", "optimizer.lora_plus_ratio=16"], "optimizer.lora_plus_ratio needs an adapter"),
        (["adapter.init_from=a@1", "objective={type: dpo}"], "adapter.init_from: with objective dpo the reference"),
    ],
)
def test_settings_that_do_not_go_together(overrides, message):
    assert any(message in problem for problem in problems(GOOD, overrides))


@pytest.mark.parametrize(
    ("overrides", "advice"),
    [
        ([], []),
        (["adapter.targets=[q_proj, v_proj]"], ["adapter.targets: attention alone"]),
        (["adapter.targets=[q_proj, up_proj]"], []),
        (["batch.examples_per_step=64"], ["batch.examples_per_step: 64; large batches"]),
        (["optimizer.learning_rate=1e-5"], ["optimizer.learning_rate: 1e-05 is a rate for full"]),
        (["adapter=null", "optimizer.learning_rate=1e-5"], []),
        (["adapter=null"], ["optimizer.learning_rate: 0.0002 is a rate for LoRA"]),
        (["adapter.dropout=0.1", "workers.count=2"], ["adapter.dropout: its noise"]),
    ],
)
def test_settings_known_to_hurt_are_told(overrides, advice):
    config: RunConfig = parse_config(GOOD, overrides, kind="run", source="x")
    reported = advise(config)
    assert len(reported) == len(advice)
    assert all(text.startswith(start) for text, start in zip(reported, advice, strict=True))


@pytest.mark.parametrize(
    ("overrides", "length"),
    [(["max_steps=5"], (None, 5)), (["epochs=3"], (3, None)), (["max_steps=5", "max_steps=null"], (2, None))],
)
def test_a_length_on_the_command_line_stands_for_the_files(overrides, length):
    text = "kind: run\nname: r\nbase_model: b\nepochs: 2\ndata: {train: t}\n"
    config = parse_config(text, overrides, kind="run", source="test")
    assert (config.epochs, config.max_steps) == length


def test_all_rules_between_sections_are_told_at_once_and_a_section_is_asked_for():
    text = "kind: run\nname: r\nbase_model: b\ndata: {train: t, overlong: split}\n"
    with pytest.raises(ConfigError) as caught:
        parse_config(text, kind="run", source="test")
    assert len(caught.value.problems) == 2
    with pytest.raises(ConfigError, match="objective: 'dpo' is refused: give a section, such as"):
        parse_config(text, ["objective=dpo"], kind="run", source="test")


def test_a_problem_names_the_override_that_it_came_from():
    text = "kind: run\nname: r\nbase_model: b\nepochs: 2\ndata: {train: t, overlong: eror}\n"
    with pytest.raises(ConfigError) as caught:
        parse_config(text, ["adapter.rank=0", "optimizer={learning_rate: -1}"], kind="run", source="test")
    ends = {problem.partition(":")[0]: problem.partition("(override ")[2] for problem in caught.value.problems}
    assert ends == {
        "data.overlong": "",
        "adapter.rank": "adapter.rank=0)",
        "optimizer.learning_rate": "optimizer={learning_rate: -1})",
    }


def test_a_value_of_several_kinds_is_one_problem_and_a_spaces_keys_are_paths():
    text = "kind: sweep\nname: s\nrun: run.yaml\nspace: {adapter.rank: [4, 8]}\nsearch: {algorithm: grid}\n"
    with pytest.raises(ConfigError) as error:
        parse_config(text, ["search.fused=false"], kind="sweep", source="x")
    (problem,) = error.value.problems
    assert problem.startswith("search.fused: False is refused: Input should be 'auto' or 'off'; or: Input should be a")
    swept = parse_config(text, ["space.optimizer.learning_rate=[1e-3, 1e-2]"], kind="sweep", source="x")
    assert set(swept.space) == {"adapter.rank", "optimizer.learning_rate"}
