"""A user's own code by `module:NAME`: one file, found where the command runs."""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import write_jsonl

from ftray.config import load_config, parse_config
from ftray.config.adapter import AdapterConfig
from ftray.config.data import DataConfig
from ftray.config.serve import ServeConfig
from ftray.data.pack import pack
from ftray.data.tokens import tokenize_source
from ftray.errors import ConfigError, DataError, InterruptedRunError, UserError
from ftray.evaluate.task import Evaluation, judged
from ftray.infer.engines import check_engine, generate, make_engine
from ftray.infer.protocol import Request, SamplingParams
from ftray.model.adapters.lora import describe
from ftray.model.base import BaseModel
from ftray.model.families import KINDS, check_config, layer_kinds
from ftray.model.flops import count_flops
from ftray.model.hardware import choose_hardware
from ftray.model.heads import head_of
from ftray.model.packed import PackedCausalLM, register_packed_attention
from ftray.model.weights import load_weights
from ftray.objectives import LogProbs, make_loss, objective_of, sft_loss
from ftray.plugins import load_plugin
from ftray.submit.own_code import check_own_code, own_code_in
from ftray.sweep.fused.eligibility import why_not
from ftray.tasks import Question, find_task
from ftray.train.hooks.own_callbacks import calling, own_callbacks
from ftray.train.prepare import prepare

ROOT = Path(__file__).parents[2]
TOY = '''
"""Likelihood of the answers, so many times."""

from typing import Literal

from ftray.objectives import Loss, Objective, sft_loss
from ftray.schema import PositiveFloat, Strict


class Times(Strict):
    type: str
    factor: PositiveFloat = 2.0


def make_loss(config):
    def loss(log_probs, row):
        whole = sft_loss(log_probs, row)
        return Loss(sum=whole.sum * config.factor, count=whole.count)

    return loss


TIMES = Objective(Times, make_loss, shape="conversation")
WRONG = Objective(Times, lambda config: lambda log_probs, row: log_probs.policy, shape="conversation")
NONE = Objective(Times, lambda config: lambda log_probs, row: None, shape="conversation")
NUMBER = 3
'''
TOY_TASK = '''
"""An answer is good that has the expected word in it, and short."""

from ftray.tasks import Task


def judge(question, answer):
    return {"contains": float(question.expected in answer), "short": float(len(answer) < 10)}


CONTAINS = Task(judge, score="contains")
'''
TOY_FORMAT = '''
"""Rows of a made-up quiz."""

from ftray.data.formats import Format
from ftray.errors import DataError


def read(row):
    if "a" not in row:
        raise DataError("no answer")
    return [{"role": "user", "content": row["q"]}, {"role": "assistant", "content": row["a"]}]


QUIZ = Format("conversation", read)
TEXTS = Format("document", lambda row: row["q"])
'''
TOY_HEAD = '''
"""The first number of each hidden state."""

from ftray.objectives import Objective, sft_loss
from ftray.schema import Strict


class First:
    task_type, saved_modules = "SEQ_CLS", ("score",)

    def __call__(self, model, hidden_NE, targets_N):
        return hidden_NE[:, 0].float()

    def parameters(self, config):
        return 1


class Section(Strict):
    type: str


FIRST = First()
SCORED = Objective(Section, lambda config: sft_loss, shape="conversation", head="toy_head:FIRST")
NUMBER = 3
'''
TOY_ENGINE = '''
"""Answers everything with the same token."""

from ftray.config.engines import EngineKind
from ftray.infer.protocol import TokenEvent


class Parrot:
    tokenizer, vocab_size = None, 1

    def __init__(self, base, hardware, config, adapters):
        self.waiting, self.config = [], config

    def add(self, request):
        self.waiting.append(request)

    def step(self):
        events = [TokenEvent(request.id, 0, "me too", 1, "stop") for request in self.waiting]
        self.waiting = []
        return events

    @property
    def has_work(self):
        return bool(self.waiting)


PARROT = EngineKind("toy_engine:Parrot", keeps_adapter_dtype=False)
ABSENT = EngineKind("toy_engine:Parrot", package="no_such_package_at_all")
'''
TOY_CODE = '''
"""A transform and callbacks."""

def kept(row):
    return None if row["q"] == "drop me" else {"prompt": row["q"], "completion": row["a"].upper()}


def broken(row):
    return row["missing"]


def listing(row):
    return [row]


def shout(record):
    raise KeyError("my own mistake")


NUMBER = 3
'''
RUN = "kind: run\nname: r\nbase_model: base\nmax_steps: 1\ndata: {train: t.jsonl}\n"


@pytest.fixture
def toy(tmp_path, monkeypatch):
    (tmp_path / "toy_objective.py").write_text(TOY)
    (tmp_path / "toy_task.py").write_text(TOY_TASK)
    (tmp_path / "toy_format.py").write_text(TOY_FORMAT)
    (tmp_path / "toy_engine.py").write_text(TOY_ENGINE)
    (tmp_path / "toy_head.py").write_text(TOY_HEAD)
    (tmp_path / "toy_code.py").write_text(TOY_CODE)
    (tmp_path / "broken_objective.py").write_text("import no_such_package_at_all\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in ("toy_objective", "toy_task", "toy_format", "toy_code", "toy_engine", "toy_head", "broken_objective"):
        sys.modules.pop(name, None)


def parse(objective: str):
    return parse_config(RUN, [f"objective={objective}"], kind="run", source="test")


class TwoTargets:
    weights_N = torch.ones(2)
    sequences_N = torch.zeros(2, dtype=torch.long)
    num_sequences = 1


def test_an_objective_of_ones_own_is_one_file(toy):
    config = parse("{type: 'toy_objective:TIMES', factor: 3}")
    assert objective_of(config.objective).shape == "conversation"
    loss = make_loss(config.objective)(LogProbs(torch.tensor([-1.0, -2.0])), TwoTargets())
    assert (loss.sum.item(), loss.count.item()) == (9.0, 2.0)
    again = type(config).model_validate_json(config.model_dump_json())  # as workers and resumed runs read it
    assert again == config


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("WRONG", r"toy_objective:WRONG: AttributeError: .*'policy' \(.*toy_objective.py:\d+\)"),
        ("NONE", "returned NoneType, and must return a Loss"),
    ],
)
def test_a_mistake_in_ones_own_loss_is_told_once(toy, name, problem):
    """A `UserError`: the workers are not started again for it."""
    loss = make_loss(parse(f"{{type: 'toy_objective:{name}'}}").objective)
    with pytest.raises(UserError, match=problem):
        loss(LogProbs(torch.tensor([-1.0, -2.0])), TwoTargets())


@pytest.mark.parametrize(
    ("objective", "problem"),
    [
        ("{type: 'toy_objective:TIMES', factor: -1}", "objective: factor: Input should be greater than 0"),
        ("{type: 'toy_objective:TIMES', facto: 1}", "objective: facto: Extra inputs are not permitted"),
        ("{type: 'toy_objective:MISSING'}", "the module toy_objective has no MISSING"),
        ("{type: 'toy_objective:NUMBER'}", "is of type int, and must be of type Objective"),
        ("{type: 'no_such_module:X'}", "no module named 'no_such_module'"),
        ("{type: 'broken_objective:X'}", "no module named 'no_such_package_at_all'"),
    ],
)
def test_mistakes_are_one_line_each(toy, objective, problem):
    with pytest.raises(ConfigError) as caught:
        parse(objective)
    assert len(caught.value.problems) == 1
    assert problem in caught.value.problems[0]


def test_a_plugin_that_is_found_nowhere_says_where_it_was_looked_for(toy, tmp_path):
    with pytest.raises(UserError, match=f"it is looked for in {tmp_path}"):
        load_plugin("nowhere:X", object, key="task")


def test_a_task_of_ones_own_is_one_file(toy):
    question = Question([{"role": "user", "content": "why?"}], "because")
    task = find_task("toy_task:CONTAINS")
    answers = [judged(task, question, text) for text in ("because", "because of the rain", "no")]
    evaluation = Evaluation("m", answers, loss=None, task=task)
    assert evaluation.scores == {"contains": pytest.approx(2 / 3), "short": pytest.approx(2 / 3)}
    assert evaluation.accuracy == evaluation.scores["contains"]
    assert [answer.answer for answer in evaluation.losing] == ["because of the rain", "no"]


def test_a_task_that_is_none_says_which_there_are():
    with pytest.raises(UserError, match="'exact-match' is no task; did you mean 'exact_match'"):
        find_task("exact-match")


def tokens(path, renderer, **data):
    return tokenize_source("data.train", str(path), DataConfig(train=str(path), **data), renderer)


def test_a_format_of_ones_own_is_one_file(toy, tmp_path, renderer):
    own = write_jsonl(tmp_path / "own.jsonl", [{"q": f"question {i}", "a": f"answer {i}"} for i in range(40)])
    rows = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(40)]
    usual = write_jsonl(tmp_path / "usual.jsonl", rows)
    found, expected = tokens(own, renderer, format="toy_format:QUIZ"), tokens(usual, renderer)
    assert found.ids.tolist() == expected.ids.tolist()
    assert found.trained.tolist() == expected.trained.tolist()
    with pytest.raises(UserError, match="reads a document, and the objective trains on a conversation"):
        tokens(own, renderer, format="toy_format:TEXTS")
    broken = write_jsonl(tmp_path / "broken.jsonl", [{"q": "a", "a": "b"}, {"q": "c"}])
    with pytest.raises(DataError, match="row 2"):
        tokens(broken, renderer, format="toy_format:QUIZ")
    with pytest.raises(ConfigError, match="both say how a row is read"):
        parse_config(RUN, ["data.format=a:B", "data.columns={text: t}"], kind="run", source="test")


def test_tokens_are_made_anew_when_a_format_changes(toy, tmp_path, renderer):
    from ftray.data.formats import code_digest

    data = DataConfig(train="x", format="toy_format:QUIZ")
    before = code_digest(data)
    (tmp_path / "toy_format.py").write_text(TOY_FORMAT + "# changed\n")
    assert code_digest(data) != before
    assert code_digest(DataConfig(train="x")) is None


def test_a_transform_of_ones_own_is_one_function(toy, tmp_path, renderer):
    asked = [{"q": "drop me" if i % 4 == 0 else f"question {i}", "a": f"answer {i}"} for i in range(12)]
    own = write_jsonl(tmp_path / "own.jsonl", asked)
    rows = [{"prompt": r["q"], "completion": r["a"].upper()} for r in asked if r["q"] != "drop me"]
    usual = write_jsonl(tmp_path / "usual.jsonl", rows)
    found, expected = tokens(own, renderer, transform="toy_code:kept"), tokens(usual, renderer)
    assert found.ids.tolist() == expected.ids.tolist()
    assert found.trained.tolist() == expected.trained.tolist()
    assert found.rows.tolist() == [i + 1 for i in range(12) if i % 4]
    assert found.counts() == expected.counts() | {"rows": 12, "dropped": 3}
    with pytest.raises(DataError, match=r"row 1: data.transform: KeyError: 'missing'"):
        tokens(own, renderer, transform="toy_code:broken")
    with pytest.raises(DataError, match="returned list, and must return a dict or None"):
        tokens(own, renderer, transform="toy_code:listing")
    with pytest.raises(DataError, match=r"no row is left: 0 are over data.max_example_tokens, 1 were dropped"):
        tokens(write_jsonl(tmp_path / "none.jsonl", asked[:1]), renderer, transform="toy_code:kept")


def test_a_callback_of_ones_own_is_one_function(toy, train_file):
    config = parse_config(RUN, ["callbacks=['toy_code:shout']"], kind="run", source="test")
    stopped, plain = [], []
    raises = pytest.raises(KeyError, match="my own mistake")
    with raises, calling([plain.append, *own_callbacks(config)], stop=lambda: stopped.append(1)) as on_metrics:
        on_metrics([{"step": 1}, {"step": 2}])
        on_metrics([{"step": 3}])
        raise InterruptedRunError("stopped")  # what the stop request leads to
    assert (plain, stopped) == ([{"step": 1}], [1])


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("callbacks=['toy_code:NUMBER']", "callbacks.0: toy_code:NUMBER: is of type int, and must be a function"),
        ("data.transform=toy_code:absent", "data.transform: toy_code:absent: the module toy_code has no absent"),
    ],
)
def test_functions_that_are_none_are_refused_before_a_start(toy, override, problem, train_file, tmp_path):
    overrides = [override, f"data.train={train_file}", f"base_model={tmp_path}"]
    config = parse_config(RUN, overrides, kind="run", source="test")
    with pytest.raises(UserError, match=problem):
        prepare(config, fresh=False)


def test_a_jobs_own_code_is_in_its_upload(toy, tmp_path, train_file):
    (tmp_path / "sub").mkdir()
    overrides = [f"data.train={train_file}", "callbacks=['toy_code:shout']", "data.format=toy_format:QUIZ"]
    config = parse_config(RUN, overrides, kind="run", source="test")
    assert set(own_code_in(config.model_dump())) == {
        ("callbacks", "toy_code:shout"),
        ("data.format", "toy_format:QUIZ"),
    }
    check_own_code("run", config, root=tmp_path)
    with pytest.raises(UserError, match=f"lies in {tmp_path}, and the job looks for it in .*/sub; put it there"):
        check_own_code("run", config, root=tmp_path / "sub")
    for sweep in ("sweep", "pipeline"):  # through the files that they name
        (tmp_path / "run.yaml").write_text(RUN + "callbacks: [no_module:f]\n")
        loaded = SimpleNamespace(run="run.yaml", train=["run.yaml"], model_dump=lambda mode: {})
        with pytest.raises(UserError, match="callbacks: no_module:f: no module named 'no_module'"):
            check_own_code(sweep, loaded, root=tmp_path)
    installed = parse_config(RUN, ["callbacks=['json:loads']"], kind="run", source="test")
    check_own_code("run", installed, root=tmp_path / "sub")


def test_the_example_of_own_code_counts_what_is_sure_for_less(monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config("configs/own_code/run.yaml", kind="run")
    prepare(config, fresh=False)
    log_probs = LogProbs(torch.tensor([0.9, 0.2]).log())
    focal = make_loss(config.objective)(log_probs, TwoTargets()).sum
    torch.testing.assert_close(focal, -torch.tensor(0.1 * math.log(0.9) + 0.8 * math.log(0.2)))
    plain = config.objective.model_copy(update={"gamma": 0.0})
    assert make_loss(plain)(log_probs, TwoTargets()).sum == sft_loss(log_probs, TwoTargets()).sum


def serve(overrides: list[str]) -> ServeConfig:
    return parse_config("kind: serve\nbase_model: base\n", overrides, kind="serve", source="test")


def test_an_engine_of_ones_own_is_one_file(toy):
    config = serve(["engine.type=toy_engine:PARROT", "engine.context_tokens=64"])
    engine = make_engine(BaseModel("base", Path("."), "f"), choose_hardware(), config.engine, config.adapters)
    assert engine.config.context_tokens == 64  # pyright: ignore[reportAttributeAccessIssue]
    assert generate(engine, [Request("r", [1]), Request("s", [2])]) == {"r": "me too", "s": "me too"}
    with pytest.raises(UserError, match="no_such_package_at_all is not installed"):
        check_engine(serve(["engine.type=toy_engine:ABSENT"]).engine)


def test_the_example_of_an_own_engine_tells_of_slow_steps(tiny_base, monkeypatch, caplog):
    config = load_config("configs/own_code/serve.yaml", ["engine.kv_cache_tokens=1024"], kind="serve")
    monkeypatch.setattr("configs.own_code.watched_engine.SLOW_S", 0)
    engine = make_engine(tiny_base, choose_hardware(), config.engine, config.adapters)
    assert generate(engine, [Request("r", [1, 2, 3], SamplingParams(max_tokens=2))])["r"] is not None
    assert "a step of 1 tokens took" in caplog.text


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["engine.type=toy_engine:MISSING"], "the module toy_engine has no MISSING"),
        (["engine.type=toy_engine:Parrot"], "must be of type EngineKind"),
        (["engine.type=toy_engine:PARROT", "engine.tensor_parallel=2"], "needs engine.type vllm"),
        (
            ["engine.type=toy_engine:PARROT", "adapters.dtype=bfloat16"],
            "needs engine.type torch; toy_engine:PARROT has",
        ),
        (["engine.type=vlm"], "engine.type"),
    ],
)
def test_what_an_engine_cannot_do_is_refused(toy, overrides, problem):
    with pytest.raises(ConfigError, match=problem):
        serve(overrides)


def test_a_head_of_ones_own_is_one_file(toy, tiny_base, tmp_path):
    head = head_of(objective_of(parse("{type: 'toy_head:SCORED'}").objective).head)
    model = load_weights(tiny_base, choose_hardware(), attention=register_packed_attention())
    row = pack([Sentence()])
    scores_N = PackedCausalLM(model, head=head)(row)
    hidden_TE = model(row.ids_T[None], output_hidden_states=True, **plain(row)).hidden_states[-1][0]
    torch.testing.assert_close(scores_N, hidden_TE[row.rows_N, 0])
    assert count_flops(model, head).head_parameters == 1
    described = describe({}, AdapterConfig(modules_to_save=["norm"]), tiny_base, head, growth=1, ties=False)
    assert (described["task_type"], described["modules_to_save"]) == ("SEQ_CLS", ["norm", "score"])
    with pytest.raises(UserError, match="is of type int, and must be of type Head"):
        head_of("toy_head:NUMBER")


def test_an_objective_with_a_head_of_its_own_is_trained_apart(toy):
    """A fused group computes the language model's head alone."""
    own = parse("{type: 'toy_head:SCORED'}")
    assert why_not(own) == "objective.type: toy_head:SCORED cannot be fused"
    assert why_not(parse("{type: 'toy_objective:TIMES'}")) is None


def plain(row) -> dict:
    """transformers' own call of the packed model."""
    kinds = layer_kinds(FakeConfig())
    return {"layout": row.layout, "attend": [kind.attend_packed for kind in kinds], "use_cache": False}


class FakeConfig:
    layer_types, num_hidden_layers, num_attention_heads, head_dim = None, 8, 1, 1


@dataclass(frozen=True)
class Sentence:
    number, row, length, num_trained, extras = 0, 1, 6, 3, {}
    sequences = ((np.arange(1, 7), np.array([False, False, False, True, True, True])),)


@dataclass(frozen=True)
class Local:
    """A layer kind of one file: a token sees itself and the one before."""

    def attend_packed(self, query_HTD, key_KTD, value_KTD, layout, **scores):
        mixed = value_KTD.clone()
        mixed[:, 1:] = (value_KTD[:, 1:] + value_KTD[:, :-1]) / 2
        return mixed.repeat_interleave(len(query_HTD) // len(key_KTD), 0).transpose(0, 1)

    def first_seen(self, position):
        return max(0, position - 1)

    def flops(self, lengths):
        return 2.0 * sum(length * count for length, count in lengths.items())


def test_a_kind_of_layer_is_one_file(tiny_base, monkeypatch):
    """Each layer attends as its kind does, and is counted so."""
    model = load_weights(tiny_base, choose_hardware(), attention=register_packed_attention())
    row = pack([Sentence()])
    whole, flops = PackedCausalLM(model)(row), count_flops(model)
    monkeypatch.setitem(KINDS, "local", lambda config: Local())
    config = model.config.get_text_config()
    names = ["full_attention"] * (config.num_hidden_layers - 1) + ["local"]
    monkeypatch.setattr(config, "layer_types", names, raising=False)
    assert not torch.allclose(PackedCausalLM(model)(row), whole)
    changed = count_flops(model)
    assert changed.layers[:-1] == flops.layers[:-1]
    once = {"num_tokens": 0, "num_trained": 0, "lengths": {6: 1}}
    assert changed.forward(**once) == flops.forward(**once) - flops.layers[0].flops({6: 1}) + 12.0
    check_config({"layer_types": ["local"]}, name="m")
    with pytest.raises(UserError, match="uses elsewhere"):
        check_config({"layer_types": ["elsewhere"]}, name="m")
