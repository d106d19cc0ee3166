"""`ftray pipeline`: two runs in order, measured, judged and published; each stage stands once it is done."""

import json

import pytest
from tiny import pair_rows, write_jsonl

from ftray.artifacts.publish import publish_adapter
from ftray.artifacts.resolve import resolve_start
from ftray.cli.main import main
from ftray.config import parse_config
from ftray.errors import ConfigError, DataError, FtrayError, UserError
from ftray.evaluate.offline import evaluate_offline
from ftray.evaluate.scores import Score
from ftray.evaluate.task import load_questions
from ftray.infer.engines import load_adapter, make_local_engine
from ftray.model.hardware import choose_hardware
from ftray.pipeline.check import check_pipeline
from ftray.pipeline.scores import judge
from ftray.pipeline.stages import run_pipeline
from ftray.registry import Registry
from ftray.storage import read_json, write_json
from ftray.train.on_ray.trainer import Watcher
from ftray.train.prepare import PreparedRun, prepare


@pytest.fixture
def files(tiny_model, train_file, eval_file, tmp_path):
    """A run on documents, then one on conversations; returns what makes a pipeline of them."""
    text = write_jsonl(tmp_path / "text.jsonl", [{"text": f"the refund of order {n} is late"} for n in range(30)])
    shared = (
        f"kind: run\nbase_model: {tiny_model}\nruns_dir: {tmp_path}/runs\nregistry: {tmp_path}/registry\nmax_steps: 4\n"
        "batch: {examples_per_step: 4}\noptimizer: {learning_rate: 1e-2, schedule: constant}\n"
    )
    (tmp_path / "domain.yaml").write_text(
        f"{shared}name: domain\nobjective: {{type: text}}\ndata: {{train: {text}, columns: {{text: text}}}}\n"
    )
    (tmp_path / "chat.yaml").write_text(f"{shared}name: chat\ndata: {{train: {train_file}, eval: {eval_file}}}\n")

    def make(*settings):
        described = (
            f"kind: pipeline\nname: support\ntrain: [{tmp_path}/domain.yaml, {tmp_path}/chat.yaml]\n"
            f"general_text: {text}\npublish: {{name: support-bot, alias: prod}}\n"
        )
        return parse_config(described, settings, kind="pipeline", source="test")

    return make


def run(config):
    said: list[str] = []
    watcher = Watcher(log=said.append, on_metrics=lambda records: None, on_start=lambda first, count: None)
    return run_pipeline(config, watcher, said.append), said


def test_stages_in_order_and_each_once(ray_session, files, tmp_path, tiny_base, eval_file):
    with pytest.raises(FtrayError, match=r"nothing was published: tuned\.loss < 0: does not hold \(tuned\.loss = "):
        run(files("require=[tuned.loss < base.loss, tuned.loss < 0]"))
    registry = Registry(str(tmp_path / "registry"))
    assert registry.names() == []
    record = read_json(tmp_path / "runs/support/pipeline.json")
    assert [condition["holds"] for condition in record["conditions"]] == [True, False]

    # Both runs and their scores stand; only the condition is another one.
    outcome, said = run(files("require=[tuned.loss < base.loss]"))
    assert sum("is finished already" in line for line in said) == 2
    assert not any("workers run on" in line for line in said)
    assert str(outcome.version) == "support-bot@1"
    assert registry.aliases("support-bot") == {"prod": 1}
    again, _ = run(files("require=[tuned.loss < base.loss]"))
    assert again.version.number == 1

    # The second run went on from the first one's adapter.
    config = read_json(tmp_path / "runs/chat/config.json")
    assert config["adapter"]["init_from"] == str(tmp_path / "runs/domain/adapter")

    # As `ftray eval` measures it.
    engine = make_local_engine(tiny_base, choose_hardware(), context_tokens=256)
    load_adapter(engine, "tuned", tmp_path / "runs/chat/adapter")
    chat = parse_config((tmp_path / "chat.yaml").read_text(), kind="run", source="x")
    for name, adapter in (("base", None), ("tuned", "tuned")):
        found = evaluate_offline(engine, load_questions(chat.data), chat.data, adapter=adapter, model=name)
        assert outcome.scores[name].loss == pytest.approx(found.loss, rel=1e-6)
        assert outcome.scores[name].accuracy == found.accuracy
    engine.close()
    metadata = registry.get("support-bot@prod").metadata
    assert metadata["lineage"]["measured"]["tuned"]["loss"] == outcome.scores["tuned"].loss
    assert metadata["lineage"]["pipeline"] == "support"

    # A record of other weights does not count, and a run that was trained from others is no stage of this.
    path = tmp_path / "runs/support/pipeline.json"
    path.write_text(json.dumps(read_json(path) | {"measured": "of another", "scores": {"tuned": {}}}))
    assert run(files("require=[tuned.loss < base.loss]"))[0].scores == outcome.scores
    path.write_text(json.dumps(read_json(path) | {"started_from": {"chat": "of another"}}))
    with pytest.raises(UserError, match=r"chat: was trained from other weights than .*--fresh"):
        run(files())


def test_a_condition_without_a_value_does_not_hold():
    scores = {"base": Score(0.0, None), "tuned": Score(0.9, None)}
    assert not judge("tuned.accuracy / base.accuracy >= 1.5", scores).holds
    assert judge("tuned.accuracy - base.accuracy >= 0.5", scores).holds


def test_a_run_keeps_the_version_that_it_began_with(tiny_model, adapters, train_file, tmp_path):
    registry = Registry(str(tmp_path / "registry"))
    for name in ("r4", "r4b"):
        publish_adapter(registry, "support", adapters[name])
    registry.promote("support@1", "prod")
    text = (
        f"kind: run\nname: on\nbase_model: {tiny_model}\nmax_steps: 1\nruns_dir: {tmp_path}/runs\n"
        f"registry: {tmp_path}/registry\ndata: {{train: {train_file}}}\nadapter: {{rank: 4, init_from: support@prod}}\n"
    )
    config = parse_config(text, kind="run", source="x")
    start = resolve_start(prepare(config))
    begun = start.config
    assert (begun.adapter.init_from, str(start.init_from)) == ("support@1", registry.place(registry.get("support@1")))
    write_json(tmp_path / "runs/on/config.json", begun.model_dump(mode="json"))
    registry.promote("support@2", "prod")
    assert resolve_start(PreparedRun(config, False, ())).config.adapter.init_from == "support@1"
    assert resolve_start(PreparedRun(config, True, ())).config.adapter.init_from == "support@2"


def test_mistakes_are_told_before_the_first_step(files, tiny_model, tmp_path, capsys):
    with pytest.raises(ConfigError, match=r"require\.0: .*tuned\.speed is not measured; there are base\.accuracy"):
        files("require=[tuned.speed > 1]")
    with pytest.raises(ConfigError, match="is no condition"):
        files("require=[tuned.loss + 1]")
    with pytest.raises(ConfigError, match="general_text, which is not given"):
        files("general_text=null", "require=[tuned.general_loss < 2]")
    with pytest.raises(UserError, match=r"require: accuracy needs questions"):
        check_pipeline(files(f"train=[{tmp_path}/domain.yaml]", "require=[tuned.accuracy > 0.5]"))
    with pytest.raises(UserError, match="need names of their own"):
        check_pipeline(files(f"train=[{tmp_path}/chat.yaml, {tmp_path}/chat.yaml]"))
    with pytest.raises(UserError, match="there is no adapter to publish"):
        check_pipeline(files("overrides={adapter: null}"))
    with pytest.raises(ConfigError, match=r"batch\.examples"):
        check_pipeline(files("overrides={batch: {examples: 4}}"))
    with pytest.raises(DataError, match=r"general_text: absent\.jsonl: no such file"):
        check_pipeline(files("general_text=absent.jsonl"))
    with pytest.raises(UserError, match=r"support-bot@v1\.2"):
        check_pipeline(files("publish.alias=v1.2"))
    (tmp_path / "rank.yaml").write_text((tmp_path / "chat.yaml").read_text() + "adapter: {rank: 4}\n")
    with pytest.raises(UserError, match=r"has adapter\.rank 4, domain 16; they must be the same"):
        check_pipeline(files(f"train=[{tmp_path}/domain.yaml, {tmp_path}/rank.yaml]"))
    pairs = write_jsonl(tmp_path / "pairs.jsonl", pair_rows(4))
    (tmp_path / "pairs.yaml").write_text(
        f"kind: run\nname: pairs\nbase_model: {tiny_model}\nmax_steps: 1\nobjective: {{type: dpo}}\n"
        f"data: {{train: {pairs}}}\n"
    )
    with pytest.raises(ConfigError, match=r"adapter\.init_from: with objective dpo"):
        check_pipeline(files(f"train=[{tmp_path}/domain.yaml, {tmp_path}/pairs.yaml]"))
    (tmp_path / "full.yaml").write_text((tmp_path / "chat.yaml").read_text() + "adapter: null\n")
    with pytest.raises(UserError, match="cannot go on from an adapter"):
        check_pipeline(files(f"train=[{tmp_path}/domain.yaml, {tmp_path}/full.yaml]", "publish=null"))
    (tmp_path / "sweep.yaml").write_text(
        f"kind: sweep\nname: tries\nrun: {tmp_path}/chat.yaml\nspace: {{optimizer.learning_rate: [1e-3, 1e-2]}}\n"
        "search: {algorithm: grid}\n"
    )
    check_pipeline(files(f"train=[{tmp_path}/sweep.yaml]"))
    with pytest.raises(UserError, match="a sweep starts from its base"):
        check_pipeline(files(f"train=[{tmp_path}/domain.yaml, {tmp_path}/sweep.yaml]"))
    (tmp_path / "none.yaml").write_text("kind: pipeline\nname: a\ntrain: [absent.yaml]\n")
    with pytest.raises(SystemExit) as ended:
        main(["pipeline", str(tmp_path / "none.yaml")])
    assert ended.value.code == 2
    assert "absent.yaml: 1 problem\n  - no such file" in capsys.readouterr().err
