"""A user's own code by `module:NAME`: one file, found where the command runs."""

import sys

import pytest
import torch
from tiny import write_jsonl

from ftray.config import parse_config
from ftray.config.data import DataConfig
from ftray.data.tokens import tokenize_source
from ftray.errors import ConfigError, DataError, UserError
from ftray.evaluate.task import Evaluation, judged
from ftray.objectives import LogProbs, make_loss, objective_of
from ftray.plugins import load_plugin
from ftray.tasks import Question, find_task

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
RUN = "kind: run\nname: r\nbase_model: base\nmax_steps: 1\ndata: {train: t.jsonl}\n"


@pytest.fixture
def toy(tmp_path, monkeypatch):
    (tmp_path / "toy_objective.py").write_text(TOY)
    (tmp_path / "toy_task.py").write_text(TOY_TASK)
    (tmp_path / "toy_format.py").write_text(TOY_FORMAT)
    (tmp_path / "broken_objective.py").write_text("import no_such_package_at_all\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in ("toy_objective", "toy_task", "toy_format", "broken_objective"):
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
    from ftray.data.formats import format_digest

    data = DataConfig(train="x", format="toy_format:QUIZ")
    before = format_digest(data)
    (tmp_path / "toy_format.py").write_text(TOY_FORMAT + "# changed\n")
    assert format_digest(data) != before
    assert format_digest(DataConfig(train="x")) is None
