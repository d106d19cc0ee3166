"""Tokens are kept by what they depend on, and the same whether one process made them or several."""

import copy
import dataclasses
import shutil

import numpy as np
import pytest
from tiny import chat_rows, write_jsonl

from ftray.config.data import DataConfig
from ftray.data import tokens
from ftray.data.tokens import tokenize_source
from ftray.errors import DataError
from ftray.model.chat import ChatRenderer


@pytest.fixture
def made(monkeypatch):
    """How often tokens were made and not found."""
    calls: list[str] = []
    real = tokens.tokenize
    monkeypatch.setattr(tokens, "tokenize", lambda source, *a, **k: (calls.append(str(source)), real(source, *a, **k)))
    return calls


def test_kept_tokens_are_found_until_something_differs(tmp_path, renderer, made):
    path = write_jsonl(tmp_path / "d.jsonl", chat_rows(20))

    def again(location=path, used=renderer, **settings):
        data = DataConfig(train=str(location), **settings)
        return tokenize_source("data.train", str(location), data, used, kept_in=tmp_path / "kept")

    first = again()
    assert np.array_equal(again().ids, first.ids)
    assert len(made) == 1
    again(shutil.copyfile(path, tmp_path / "copy.jsonl"))
    assert len(made) == 1, "the same content under another name"
    write_jsonl(path, chat_rows(20, seed=1))
    assert not np.array_equal(again().ids, first.ids)
    assert len(made) == 2, "another content under the same name"
    again(overlong="drop")
    assert len(made) == 3
    other = ChatRenderer(copy.deepcopy(renderer.tokenizer))
    other.tokenizer.chat_template += "{# changed #}"
    again(used=other)
    assert len(made) == 4, "another template"


def test_damaged_tokens_are_made_again(tmp_path, renderer, made):
    path = write_jsonl(tmp_path / "d.jsonl", chat_rows(20))
    data = DataConfig(train=str(path))
    first = tokenize_source("data.train", str(path), data, renderer, kept_in=tmp_path / "kept")
    expected = first.ids.copy()
    file = next((tmp_path / "kept").glob("*/ids.bin"))
    file.write_bytes(file.read_bytes()[:-4])
    again = tokenize_source("data.train", str(path), data, renderer, kept_in=tmp_path / "kept")
    assert np.array_equal(again.ids, expected)
    assert len(made) == 2


def test_several_processes_make_the_same_tokens(tmp_path, renderer, monkeypatch):
    rows = chat_rows(30)
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    data = DataConfig(train=str(path))
    alone = tokenize_source("data.train", str(path), data, renderer)
    monkeypatch.setattr(tokens, "ROWS_PER_PROCESS", 10)
    together = tokenize_source("data.train", str(path), data, renderer, processes=2)
    for field in dataclasses.fields(alone):
        if field.name != "directory":
            assert np.array_equal(getattr(alone, field.name), getattr(together, field.name)), field.name
    assert together.counts() == alone.counts()
    rows[3] = {"messages": rows[3]["messages"][:1]}
    rows[25] = {"messages": rows[25]["messages"][:1]}
    write_jsonl(path, rows)
    with pytest.raises(DataError, match=r"2 of 30 rows cannot be trained:\n  - row 4: .*\n  - row 26: "):
        tokenize_source("data.train", str(path), data, renderer, processes=2, kept_in=tmp_path / "kept")
    assert list((tmp_path / "kept").glob("*/counts.json")) == [], "nothing half is kept"
