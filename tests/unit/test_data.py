import csv
import json
from dataclasses import dataclass

import numpy as np
import pytest
from tiny import chat_rows, write_jsonl

from ftray.config.data import ColumnsConfig, DataConfig
from ftray.data.dataset import RowCounts, TokenizedDataset
from ftray.data.examples import DatasetSource
from ftray.data.micro_batches import divide
from ftray.data.sources import load_rows
from ftray.data.tokens import tokenize_source
from ftray.errors import DataError


def tokenize(path, renderer, **settings):
    return tokenize_source("data.train", str(path), DataConfig(train=str(path), **settings), renderer)


def test_every_format_gives_the_same_tokens(tmp_path, renderer):
    import datasets

    pairs = [{"q": "where is it", "a": "there"}, {"q": "who", "a": "me"}]
    write_jsonl(tmp_path / "d.jsonl", pairs)
    (tmp_path / "d.json").write_text(json.dumps(pairs))
    with (tmp_path / "d.csv").open("w") as file:
        writer = csv.DictWriter(file, ["q", "a"])
        writer.writeheader()
        writer.writerows(pairs)
    datasets.Dataset.from_list(pairs).to_parquet(tmp_path / "d.parquet")
    datasets.Dataset.from_list(pairs).save_to_disk(tmp_path / "saved")
    columns = ColumnsConfig(prompt="q", completion="a")
    sets = [
        tokenize(tmp_path / n, renderer, columns=columns) for n in ("d.jsonl", "d.json", "d.csv", "d.parquet", "saved")
    ]
    for other in sets[1:]:
        assert np.array_equal(sets[0].ids, other.ids)
        assert np.array_equal(sets[0].trained, other.trained)


def test_prompt_columns_are_joined_and_system_is_used(tmp_path, renderer):
    rows = [{"i": "Sum", "x": "1 2", "o": "3", "s": "Count."}, {"i": "Hi", "x": "", "o": "Ho", "s": None}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    columns = ColumnsConfig(prompt=["i", "x"], completion="o", system="s")
    dataset = tokenize(path, renderer, columns=columns)
    texts = [renderer.tokenizer.decode(dataset.sequences(i)[0][0]) for i in range(2)]
    assert texts[0].startswith("<|im_start|>system\nCount.<|im_end|>\n<|im_start|>user\nSum\n\n1 2<|im_end|>")
    assert texts[1].startswith("<|im_start|>user\nHi<|im_end|>")


def test_rows_that_cannot_be_trained_are_listed(tmp_path, renderer):
    rows = [*chat_rows(3), {"messages": [{"role": "user", "content": "no answer"}]}]
    with pytest.raises(DataError, match=r"1 of 4 rows cannot be trained:\n  - row 4: .*no assistant turn"):
        tokenize(write_jsonl(tmp_path / "x.jsonl", rows), renderer)


def test_overlong_rows_by_rule(tmp_path, renderer):
    long = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "b" * 500}]}
    late = {"messages": [{"role": "user", "content": "a" * 500}, {"role": "assistant", "content": "b"}]}
    path = write_jsonl(tmp_path / "x.jsonl", [*chat_rows(3), long, late])
    with pytest.raises(DataError, match=r"2 of 5 rows are longer.*\n  - row 4: \d+ tokens\n  - row 5"):
        tokenize(path, renderer, max_example_tokens=200)
    dropped = tokenize(path, renderer, max_example_tokens=200, overlong="drop").counts()
    assert (dropped["rows"], dropped["examples"], dropped["dropped"]) == (5, 3, 2)
    cut = tokenize(path, renderer, max_example_tokens=200, overlong="truncate").counts()
    # the second keeps no trained token, so it is dropped and counted, not trained on nothing
    assert (cut["examples"], cut["truncated"], cut["dropped"], cut["longest"]) == (4, 1, 1, 200)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", "", "the file is empty"),
        ("x.jsonl", "{not json\n", "line 1, column 2: is no JSON"),
        ("x.jsonl", '{"prompt": "a", "completion": "b"}\n\n{"prompt": "b\n', r"row 2: line 3, column \d+: is no JSON"),
        ("x.json", '[{"a": 1},\n {"a": }]', "line 2, column 8: is no JSON"),
        ("x.csv", "a,b\n", "has no rows"),
        ("x.bin", "hello", "unknown kind of file"),
        ("x.jsonl", '{"text": "a"}\n', "the columns are text"),
    ],
)
def test_a_source_that_cannot_be_used_says_why(tmp_path, renderer, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        tokenize(tmp_path / name, renderer)


def test_a_missing_source_suggests_a_near_one(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"did you mean .*train\.jsonl"):
        load_rows("data.train", str(tmp_path / "trian.jsonl"))


def test_a_missing_column_names_those_there_are(tmp_path, renderer):
    path = write_jsonl(tmp_path / "x.jsonl", [{"q": "a", "a": "b"}])
    with pytest.raises(DataError, match=r"no column 'question'; the data has q, a"):
        tokenize(path, renderer, columns=ColumnsConfig(prompt="question", completion="a"))


@dataclass(frozen=True)
class Sized:
    """What dividing looks at."""

    number: int
    length: int


def dataset_of(count: int) -> TokenizedDataset:
    """Examples of five tokens."""
    trained = np.tile([False, True, True, True, True], count)
    lengths, rows, trained_lengths = np.full(count, 5), np.arange(1, count + 1), np.full(count, 4)
    ids = np.arange(5 * count, dtype=np.int32)
    return TokenizedDataset(ids, trained, lengths, rows, trained_lengths, 1, (RowCounts(count),))


def numbers(source: DatasetSource, step: int) -> list[int]:
    return [example.number for example in source.step(step)]


def make_source(count: int = 10, **changes) -> DatasetSource:
    settings = {"examples_per_step": 4, "seed": 0, "shuffle": True} | changes
    return DatasetSource(dataset_of(count), **({"max_steps": 9} if "epochs" not in settings else {}) | settings)


def test_epochs_train_every_example_exactly_that_often():
    source = make_source(epochs=3)
    seen = [number for step in range(source.num_steps) for number in numbers(source, step)]
    assert source.num_steps == 8
    assert len(source.step(7)) == 2  # the rest, not dropped and not filled up
    assert sorted(seen) == sorted(list(range(10)) * 3)
    assert seen[:10] != seen[10:20]


def test_the_order_depends_on_the_seed_alone():
    assert numbers(make_source(), 1) == numbers(make_source(), 1)
    assert numbers(make_source(), 1) != numbers(make_source(seed=1), 1)
    assert numbers(make_source(shuffle=False), 1) == [4, 5, 6, 7]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_ranks_divide_a_step_without_loss_and_with_equal_counts(world_size):
    rng = np.random.default_rng(world_size)
    lengths = rng.integers(1, 60, size=50)
    examples = [Sized(int(i), int(lengths[i])) for i in rng.permutation(50)[:17]]
    ranks = divide(examples, world_size=world_size, token_budget=64)
    assert len({len(batches) for batches in ranks}) == 1
    found = [example.number for batches in ranks for batch in batches for example in batch]
    assert sorted(found) == sorted(example.number for example in examples)
    assert all(sum(example.length for example in batch) <= 64 for batches in ranks for batch in batches)
    loads = [sum(example.length for batch in batches for example in batch) for batches in ranks]
    assert max(loads) - min(loads) <= max(lengths)


def test_more_ranks_than_examples_leaves_empty_micro_batches():
    only = Sized(0, 5)
    assert divide([only], world_size=3, token_budget=8) == [[[only]], [[]], [[]]]
