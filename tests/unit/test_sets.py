"""Training and evaluation sets: several sources, shares by weight, hold-outs, limits, bad rows, which turns train."""

import json
from collections import Counter

import numpy as np
import pytest
from chat_templates import NAMES, TALKS, answer, tokenizer_of, user
from tiny import chat_rows, write_jsonl

from ftray.config import parse_config
from ftray.config.data import DataConfig
from ftray.data.examples import MixtureSource, dataset_source, shares
from ftray.data.sets import check_data, evaluation_set, num_shared, read_evaluation, training_set
from ftray.errors import ConfigError, DataError
from ftray.evaluate.task import load_questions
from ftray.model.chat import ChatRenderer
from ftray.objectives import TrainedTurns


def texts(dataset, renderer, numbers=None) -> list[str]:
    """What is trained of each example."""
    chosen = range(len(dataset)) if numbers is None else numbers
    found = []
    for number in chosen:
        ((ids, trained),) = dataset.sequences(number)
        found.append(renderer.tokenizer.decode(ids[trained], skip_special_tokens=True).strip())
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Three sources of 40, 20 and 10 rows, the last of prompts and completions; each answer names its source."""
    root = tmp_path_factory.mktemp("sources")
    a = [{"messages": [user(f"question {i}"), answer(f"a{i}")]} for i in range(40)]
    b = [{"messages": [user(f"request {i}"), answer(f"b{i}")]} for i in range(20)]
    c = [{"q": f"thing {i}", "a": f"c{i}"} for i in range(10)]
    return [str(write_jsonl(root / f"{name}.jsonl", rows)) for name, rows in (("a", a), ("b", b), ("c", c))]


def of_three(files, **settings) -> DataConfig:
    a, b, c = files
    columns = {"prompt": "q", "completion": "a"}
    return DataConfig.model_validate({"train": [a, {"path": b}, {"path": c, "columns": columns}], **settings})


def test_sources_are_one_set_in_their_order(files, renderer, tmp_path):
    data = of_three(files)
    for kept_in in (None, tmp_path / "kept"):
        dataset = training_set(data, renderer, kept_in=kept_in)
        assert dataset.names == ("a", "b", "c")
        expected = [f"a{i}" for i in range(40)] + [f"b{i}" for i in range(20)] + [f"c{i}" for i in range(10)]
        assert texts(dataset, renderer) == expected
        assert dataset.counts()["rows"] == 70
        assert [dataset.row_name(int(row)) for row in dataset.rows[[0, 39, 40, 69]]] == [
            "1 of a",
            "40 of a",
            "1 of b",
            "10 of c",
        ]
    again = training_set(data, renderer, kept_in=tmp_path / "kept")
    assert again.directory == dataset.directory
    alone = training_set(DataConfig(train=files[0]), renderer)
    assert np.array_equal(alone.ids, dataset.ids[: len(alone.ids)])


def test_the_tokens_of_pairs_are_joined_whole(renderer, tmp_path):
    rows = [{"prompt": f"q{i}", "chosen": f"yes {i}", "rejected": "no " * (i + 1)} for i in range(6)]
    one, two = write_jsonl(tmp_path / "one.jsonl", rows[:2]), write_jsonl(tmp_path / "two.jsonl", rows[2:])
    together = training_set(DataConfig(train=str(write_jsonl(tmp_path / "all.jsonl", rows))), renderer, shape="pair")
    data = DataConfig.model_validate({"train": [str(one), str(two)]})
    joined = training_set(data, renderer, shape="pair")
    assert np.array_equal(joined.ids, together.ids)
    assert np.array_equal(joined.sequence_lengths, together.sequence_lengths)
    held = DataConfig.model_validate({"train": str(tmp_path / "all.jsonl"), "eval": 0.5})
    sides = [made(held, renderer, shape="pair") for made in (training_set, evaluation_set)]
    assert sum(map(len, sides)) == 6
    seen = sorted(tuple(ids.tolist()) for side in sides for n in range(len(side)) for ids, _ in side.sequences(n))
    assert seen == sorted(tuple(ids.tolist()) for n in range(6) for ids, _ in together.sequences(n))


def mixture(files, renderer, *, seed=0, **length) -> tuple[MixtureSource, ChatRenderer]:
    data = of_three(files)
    dataset = training_set(data, renderer)
    return MixtureSource(dataset, [1.0, 1.0, 2.0], examples_per_step=7, seed=seed, **length), dataset


def test_a_mixture_draws_by_weight_and_resumes_by_its_step(files, renderer):
    source, dataset = mixture(files, renderer, epochs=4)
    assert source.num_steps == 40
    steps = [[example.number for example in source.step(step)] for step in range(40)]
    for epoch in range(4):
        drawn = [number for step in steps[10 * epoch : 10 * epoch + 10] for number in step]
        count = Counter(int(dataset.sources[number]) for number in drawn)
        assert [count[i] for i in range(3)] == shares([1, 1, 2], 70) == [18, 17, 35]
    # Of a source each comes as often as every other, give or take one: 72 times one of a's 40, 140 times one of c's 10.
    of_a = Counter(number for step in steps for number in step if dataset.sources[number] == 0)
    assert len(of_a) == 40
    assert set(of_a.values()) == {1, 2}
    of_c = Counter(number for step in steps for number in step if dataset.sources[number] == 2)
    assert set(of_c.values()) == {14}
    fresh, _ = mixture(files, renderer, epochs=4)
    assert [example.number for example in fresh.step(23)] == steps[23]  # asked for alone, as a resumed run does
    assert steps[0] != [example.number for example in mixture(files, renderer, seed=1, epochs=4)[0].step(0)]
    assert sorted(steps[0]) != sorted(steps[10])


def test_shares_add_up():
    assert shares([1, 1, 1], 10) == [4, 3, 3]
    assert sum(shares([0.3, 0.2, 0.5], 17)) == 17
    assert shares([5.0], 3) == [3]


def test_a_weight_that_draws_nothing_is_refused(files, renderer):
    dataset = training_set(of_three(files), renderer)
    with pytest.raises(DataError, match="the weight of b is too small"):
        MixtureSource(dataset, [1.0, 1e-6, 1.0], examples_per_step=2, seed=0, max_steps=3)


def test_a_config_picks_its_source(files, renderer):
    weighted = [{"path": path, "weight": 1.0} for path in files[:2]]
    text = f"kind: run\nname: a\nbase_model: smollm2-135m\nmax_steps: 3\ndata: {json.dumps({'train': weighted})}"
    run = parse_config(text, kind="run", source="test")
    assert isinstance(dataset_source(run, training_set(run.data, renderer)), MixtureSource)


def test_rows_are_held_out_by_what_they_say(renderer, tmp_path):
    """With another column, another order or twice: an equal conversation lies on the same side."""
    rows = [{"messages": [user(f"question {i}"), answer(f"a{i}")], "id": i} for i in range(400)]
    path = write_jsonl(tmp_path / "rows.jsonl", [*rows, *({**row, "id": -1} for row in rows[:100])])
    data = DataConfig.model_validate({"train": str(path), "eval": {"fraction": 0.2, "seed": 3}})
    train, held = training_set(data, renderer), evaluation_set(data, renderer)
    assert held is not None
    assert len(train) + len(held) == 500
    assert num_shared(train, held) == 0
    assert 60 < len(set(texts(held, renderer))) < 100
    asked = [talk.messages[-1]["content"] for _, _, talk in read_evaluation(data, shape="conversation")]
    assert asked == texts(held, renderer)
    backwards = write_jsonl(tmp_path / "back.jsonl", rows[::-1])
    other = evaluation_set(data.model_copy(update={"train": str(backwards)}), renderer)
    assert other is not None
    assert set(texts(other, renderer)) == set(texts(held, renderer))
    another_seed = DataConfig.model_validate({"train": str(path), "eval": 0.2})
    assert set(texts(evaluation_set(another_seed, renderer), renderer)) != set(texts(held, renderer))
    # The twin: with the row number for a key, copies straddle.
    straddling = replace_keys(train), replace_keys(held)
    assert num_shared(*straddling) == 0
    assert set(texts(train, renderer)).isdisjoint(texts(held, renderer))


def replace_keys(dataset):
    from dataclasses import replace

    return replace(dataset, keys=dataset.rows.astype(np.uint64))


def test_a_hold_out_of_nothing_is_refused(renderer, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", chat_rows(2))
    with pytest.raises(DataError, match="holds out no row"):
        evaluation_set(DataConfig.model_validate({"train": str(path), "eval": 0.0001}), renderer)
    with pytest.raises(DataError, match="holds out every row"):
        training_set(DataConfig.model_validate({"train": str(path), "eval": 0.9999}), renderer)


def test_rows_that_are_evaluated_and_trained_are_counted(renderer, tmp_path):
    rows = chat_rows(20)
    train, other = (
        write_jsonl(tmp_path / "t.jsonl", rows),
        write_jsonl(tmp_path / "e.jsonl", [*rows[:3], *chat_rows(5, seed=9)]),
    )
    data = DataConfig.model_validate({"train": str(train), "eval": str(other)})
    found = evaluation_set(data, renderer)
    assert found is not None
    expected = {json.dumps(row["messages"]) for row in rows[:3]}
    assert num_shared(training_set(data, renderer), found) >= len(expected)


def test_a_limit_is_the_first_rows(files, renderer):
    data = DataConfig.model_validate({"train": [{"path": files[0], "limit": 3}, {"path": files[1], "limit": 99}]})
    assert texts(training_set(data, renderer), renderer) == ["a0", "a1", "a2", *(f"b{i}" for i in range(20))]


def test_bad_rows_are_refused_or_told(renderer, tmp_path):
    rows = [*chat_rows(3), {"messages": [user("a")]}, {"messages": "no"}, *chat_rows(2, seed=5)]
    path = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    with pytest.raises(DataError, match=r"2 of 7 rows cannot be trained(.|\n)*data.bad_rows: skip"):
        training_set(DataConfig(train=path), renderer)
    dataset = training_set(DataConfig(train=path, bad_rows="skip"), renderer)
    counts = dataset.counts()
    assert (counts["rows"], counts["examples"], counts["bad_rows"]) == (7, 5, 2)
    assert counts["first_bad_rows"][0].startswith("row 4: ")
    data = DataConfig.model_validate({"train": path, "eval": path, "bad_rows": "skip"})
    assert [number for _, number, _ in read_evaluation(data, shape="conversation")] == [1, 2, 3, 4, 6, 7]
    assert len(load_questions(data)) == 5  # what was read asks nothing
    with pytest.raises(DataError, match="row 4: no assistant turn"):
        load_questions(DataConfig(train=path, eval=str(write_jsonl(tmp_path / "four.jsonl", rows[:4]))))


def test_missing_files_are_named_with_their_place(files):
    data = DataConfig.model_validate({"train": [files[0], "no/such.jsonl"]})
    with pytest.raises(DataError, match=r"data.train.1: no/such.jsonl: no such file"):
        check_data(data)


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"train": [{"path": "a.jsonl", "weight": 1}, "b.jsonl"]}, "give every source a weight, or none"),
        ({"train": ["x/a.jsonl", "y/a.jsonl"]}, "several sources are called 'a'; give each a name"),
        ({"train": [{"path": "a.jsonl", "weight": 1}], "shuffle": False}, "do not go with shuffle: false"),
        ({"train": "a.jsonl", "eval": [{"path": "b.jsonl", "weight": 1}]}, "every row is evaluated once"),
        ({"train": ["a.jsonl"], "split": "train"}, "give them beside the path of each source"),
        ({"train": [{"path": "a.jsonl", "weigth": 1}]}, "data.train.0.weigth: unknown key; did you mean 'weight'"),
        ({"train": {"pth": "a.jsonl"}}, "data.train.path: required"),
        ({"train": "a.jsonl", "eval": 1.5}, "data.eval.fraction: 1.5 is refused: Input should be less than 1"),
    ],
)
def test_what_sources_cannot_mean_is_refused(data, named):
    text = f"kind: run\nname: a\nbase_model: smollm2-135m\nmax_steps: 1\ndata: {json.dumps(data)}"
    with pytest.raises(ConfigError, match=named.replace("(", r"\(")):
        parse_config(text, kind="run", source="test")


WEIGHTED = [
    user("one?"),
    answer("first", weight=1),
    user("two?"),
    answer("second", weight=0),
    user("three?"),
    answer("third"),
]


@pytest.mark.parametrize(
    ("on", "expected"), [("all", ["first", "third"]), ("last", ["third"]), ("by_weight", ["first"])]
)
def test_which_answers_train(on, expected, renderer, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": WEIGHTED}])
    dataset = training_set(DataConfig(train=str(path)), renderer, turns=TrainedTurns(on=on))
    ((ids, trained),) = dataset.sequences(0)
    text = renderer.tokenizer.decode(ids[trained], skip_special_tokens=True)
    assert text.replace(" ", "") == "".join(expected)
    assert dataset.counts()["untrained_answers"] == 3 - len(expected)


def test_a_row_without_an_answer_to_train_is_told(renderer, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": WEIGHTED[:2]}, {"messages": [user("a"), answer("b")]}])
    with pytest.raises(DataError, match="row 2: no trained token: no answer is to be trained"):
        training_set(DataConfig(train=str(path)), renderer, turns=TrainedTurns(on="by_weight"))


def test_thoughts_are_read_and_not_trained():
    """For every stock template that has a place for thoughts: the ids are the same, the thought's are not trained."""
    tried = 0
    for name in NAMES:
        renderer = ChatRenderer(tokenizer_of(name))
        if renderer.template.thought_frame is None:
            continue
        for talk in ("thought", "two thoughts"):
            try:
                whole = renderer.training_examples(TALKS[talk])
            except DataError:
                continue
            without = renderer.training_examples(TALKS[talk], trains_thoughts=False)
            for one, other in zip(whole, without, strict=True):
                assert np.array_equal(one.ids, other.ids)
                assert not (other.trained & ~one.trained).any()
                left_out = renderer.tokenizer.decode(one.ids[one.trained & ~other.trained])
                text = renderer.tokenizer.decode(other.ids[other.trained], skip_special_tokens=True)
                assert "Two and two." in left_out or "One more." in left_out, (name, talk)
                assert "Two and two." not in text, (name, talk)
                assert "It is 4." in text or "Five." in text, (name, talk)
                tried += 1
    assert tried > 20
