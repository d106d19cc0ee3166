"""Files as people have them: what is read of each is what the file says."""

import gzip
import json
import os
import shutil
from pathlib import Path

import pytest
from tiny import SHARED_DATA, write_jsonl

from ftray.config.data import ColumnsConfig, DataConfig
from ftray.data.formats import reader_of
from ftray.data.sources import load_rows, source_digest
from ftray.data.tokens import tokenize_source
from ftray.errors import DataError
from ftray.evaluate.task import load_questions
from ftray.model.base import load_tokenizer
from ftray.model.chat import ChatRenderer

ASKED = {"role": "user", "content": "hi"}
ANSWERED = {"role": "assistant", "content": "hello"}


def tokenize(path, renderer, *, shape="conversation", **settings):
    data = DataConfig(train=str(path), max_example_tokens=200_000, **settings)
    return tokenize_source("data.train", str(path), data, renderer, shape=shape)


def texts(path, renderer, **settings) -> list[str]:
    """Of each example."""
    dataset = tokenize(path, renderer, **settings)
    return [renderer.tokenizer.decode(dataset.sequences(number)[0][0]) for number in range(len(dataset))]


def trained(path, renderer, **settings) -> list[str]:
    dataset = tokenize(path, renderer, **settings)
    pairs = [dataset.sequences(number)[0] for number in range(len(dataset))]
    return [renderer.tokenizer.decode(ids[mask]) for ids, mask in pairs]


def read(path: Path, **settings) -> list:
    data = DataConfig(train=str(path), **settings)
    rows = load_rows("data.train", str(path))
    reader = reader_of(data, rows, shape="conversation", key=str(path))
    return [reader(row) for row in rows]


def test_values_stay_what_the_file_says(tmp_path, renderer):
    dates = [{"prompt": "When?", "completion": f"2024-01-{day:02}"} for day in (5, 6)]
    assert trained(write_jsonl(tmp_path / "d.jsonl", dates), renderer) == [
        "2024-01-05<|im_end|>",
        "2024-01-06<|im_end|>",
    ]
    asked = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "2024-01-05T10:00:00Z", "completion": "a"}] * 2)
    assert "2024-01-05T10:00:00Z" in texts(asked, renderer)[0]
    for cells in (["007", "1"], ["true", "false"], ["1e5", "12"], ["1.0", "2"], ["NA", "null"], ["None", "nan"]):
        path = tmp_path / "c.csv"
        path.write_text("prompt,completion\n" + "".join(f"q,{cell}\n" for cell in cells))
        assert trained(path, renderer) == [f"{cell}<|im_end|>" for cell in cells]
        path.write_text("prompt,completion\n" + "".join(f"{cell},a\n" for cell in cells))
        assert all(f"user\n{cell}<" in text for cell, text in zip(cells, texts(path, renderer), strict=True))
    path.write_text("instruction,input,output\nClassify,None,yes\n")
    assert "Classify\n\nNone<|im_end|>" in texts(path, renderer)[0]


def test_a_replaced_file_gives_the_new_rows(tmp_path, renderer):
    import datasets

    for kind in ("jsonl", "csv", "parquet"):
        path, other = tmp_path / f"a.{kind}", tmp_path / f"b.{kind}"
        for place, word in ((path, "bbbb"), (other, "dddd")):
            rows = [{"prompt": "q", "completion": word}]
            if kind == "parquet":
                datasets.Dataset.from_list(rows).to_parquet(place)
            else:
                place.write_text(f"prompt,completion\nq,{word}\n" if kind == "csv" else json.dumps(rows[0]))
        os.utime(other, (1e9, 1e9))
        os.utime(path, (1e9, 1e9))
        assert trained(path, renderer) == ["bbbb<|im_end|>"]
        before = source_digest(str(path), load_rows("data.train", str(path)))
        shutil.copy2(other, path)
        assert trained(path, renderer) == ["dddd<|im_end|>"]
        assert source_digest(str(path), load_rows("data.train", str(path))) != before


CALLS = [{"function": {"name": "look", "arguments": arguments}} for arguments in ({"city": "Rome"}, {"zone": 3})]


def test_calls_with_other_arguments_are_the_same_as_parquet_and_json(tmp_path, renderer):
    import datasets

    rows = [{"messages": [ASKED, {"role": "assistant", "content": None, "tool_calls": [call]}]} for call in CALLS]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text(json.dumps(rows))
    kinds = [write_jsonl(tmp_path / "a.jsonl", rows), tmp_path / "a.json", tmp_path / "a.parquet"]
    as_text = [{"messages": json.dumps(row["messages"])} for row in rows]
    datasets.Dataset.from_list(as_text).to_csv(tmp_path / "a.csv", index=False)
    found = [trained(path, renderer) for path in [*kinds, tmp_path / "a.csv"]]
    assert found[0][0] == '<tool_call>\n{"name": "look", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>'
    assert all(other == found[0] for other in found[1:])


SHAREGPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
OTHER_NAMES = [{"from": "Human", "value": "hi"}, {"from": "chatgpt", "value": "hello"}]
SYSTEM = {"role": "system", "content": "Latin."}
PARTS = {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}
LATER = [{"role": "user", "content": "And?\n\nx"}, {"role": "assistant", "content": "no"}]
ALPACA = {"instruction": "And?", "input": "x", "output": "no", "system": "Latin.", "history": [["hi", "hello"]]}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"conversations": SHAREGPT}, [ASKED, ANSWERED]),
        ({"conversation": OTHER_NAMES}, [ASKED, ANSWERED]),
        ({"conversations": SHAREGPT, "system": "Latin."}, [SYSTEM, ASKED, ANSWERED]),
        ({"messages": [{"role": "developer", "content": "Latin."}, ASKED, ANSWERED]}, [SYSTEM, ASKED, ANSWERED]),
        ({"messages": [PARTS, ANSWERED]}, [ASKED, ANSWERED]),
        ({"messages": json.dumps([ASKED, ANSWERED])}, [ASKED, ANSWERED]),
        ({"instruction": "hi", "input": "", "output": "hello"}, [ASKED, ANSWERED]),
        (ALPACA, [SYSTEM, ASKED, ANSWERED, *LATER]),
    ],
)
def test_conversations_are_recognised(tmp_path, row, expected):
    (talk,) = read(write_jsonl(tmp_path / "a.jsonl", [row]))
    assert talk.messages == expected


def test_sharegpts_calls_and_results(tmp_path, renderer):
    turns = [
        {"from": "human", "value": "hi"},
        {"from": "function_call", "value": '{"name": "look", "arguments": {"city": "Rome"}}'},
        {"from": "observation", "value": "sunny"},
        {"from": "gpt", "value": "hello"},
    ]
    tools = [{"name": "look", "description": "d", "parameters": {"type": "object", "properties": {}}}]
    for given in (tools, json.dumps(tools), [{"type": "function", "function": tools[0]}]):
        path = write_jsonl(tmp_path / "a.jsonl", [{"conversations": turns, "tools": given}])
        (talk,) = read(path)
        assert [message["role"] for message in talk.messages] == ["user", "assistant", "tool", "assistant"]
        assert talk.messages[1]["tool_calls"][0]["function"] == {"name": "look", "arguments": {"city": "Rome"}}
        (text,) = texts(path, renderer)
        assert text.startswith(renderer.tokenizer.decode(renderer.prompt_ids(talk.messages[:1], talk.tools)))
        assert '"name": "look"' in text
        assert "<tool_response>\nsunny" in text


@pytest.mark.parametrize("key", ["weight", "train", "loss_weight"])
def test_answers_that_are_not_to_be_trained(tmp_path, renderer, key):
    turns = [
        ASKED,
        {"role": "assistant", "content": "bad", key: 0},
        ASKED,
        {"role": "assistant", "content": "good", key: 1},
    ]
    assert trained(write_jsonl(tmp_path / "a.jsonl", [{"messages": turns}]), renderer) == ["good<|im_end|>"]
    shared = [
        {"from": "human", "value": "hi"},
        {"from": "gpt", "value": "bad", key: 0.0},
        {"from": "gpt", "value": "good"},
    ]
    assert trained(write_jsonl(tmp_path / "a.jsonl", [{"conversations": shared}]), renderer) == ["good<|im_end|>"]
    turns[1][key] = 0.5
    with pytest.raises(DataError, match=rf"message 1: {key} 0\.5 must be 0 or 1"):
        tokenize(write_jsonl(tmp_path / "a.jsonl", [{"messages": turns}]), renderer)


ROW = {"messages": [ASKED, ANSWERED]}
LINE = json.dumps(ROW)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.JSONL", LINE),
        ("a.ndjson", f"\n{LINE}\r\n\n"),
        ("a.json", json.dumps([ROW], indent=2)),
        ("a.json", json.dumps({"data": [ROW]})),
        ("a.json", json.dumps(ROW, indent=2)),
        ("a.json", json.dumps([ROW["messages"]])),
        ("a.json", json.dumps(ROW["messages"])),
        ("a.jsonl", json.dumps(ROW["messages"]) + "\n" * 20),
        ("d [v2] x/train *.jsonl", "\ufeff" + LINE),
    ],
)
def test_shapes_of_files(tmp_path, renderer, name, content):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    assert trained(path, renderer) == ["hello<|im_end|>"]


def test_packed_files_folders_globs_and_texts(tmp_path, renderer, monkeypatch):
    import pyarrow

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    content = f"{LINE}\n".encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
    with pyarrow.output_stream(str(tmp_path / "a.jsonl.zst"), compression="zstd") as file:
        file.write(content)
    for name in ("a.jsonl.gz", "a.jsonl.zst"):
        assert trained(tmp_path / name, renderer) == ["hello<|im_end|>"]
    (tmp_path / "bad.jsonl.gz").write_bytes(gzip.compress(content)[:-9])
    with pytest.raises(DataError, match="cannot be unpacked"):
        tokenize(tmp_path / "bad.jsonl.gz", renderer)
    shards = tmp_path / "shards"
    shards.mkdir()
    for number in range(3):
        write_jsonl(shards / f"{number}.jsonl", [{"prompt": "q", "completion": f"a{number}"}])
    (shards / "README.md").write_text("shards")
    wanted = [f"a{number}<|im_end|>" for number in range(3)]
    assert trained(shards, renderer) == trained(shards / "*.jsonl", renderer) == wanted
    (shards / "more.csv").write_text("prompt,completion\nq,a\n")
    with pytest.raises(DataError, match=r"files of several kinds \(\.csv, \.jsonl\)"):
        tokenize(shards, renderer)
    (tmp_path / "t.tsv").write_text("prompt\tcompletion\na,b\tc\n")
    assert trained(tmp_path / "t.tsv", renderer) == ["c<|im_end|>"]
    (tmp_path / "t.txt").write_text("first\n\nsecond\n")
    assert trained(tmp_path / "t.txt", renderer, shape="document") == ["first<|im_end|>", "second<|im_end|>"]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "these are pairs: objective: {type: dpo}"),
        ({"text": "t"}, "objective: {type: text}"),
        ({"text": "t", "category": "c"}, "{prompt: text, completion: category}"),
        ({"question": "q", "answer": "a", "id": 3}, "{prompt: question, completion: answer}"),
        ({"messages": [ASKED, ANSWERED], "label": True}, "rated answers, which objective kto trains on"),
        ({"messages": [ASKED, {"role": "assistant", "content": ""}]}, "message 1: the answer is empty"),
        ({"messages": [ANSWERED, ASKED]}, "begins with an answer"),
        (
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "function_call", "value": "look"}]},
            "must be JSON text",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWERED]}, "'image_url' is not read"),
    ],
)
def test_what_cannot_be_read_says_what_to_do(tmp_path, renderer, row, says):
    with pytest.raises(DataError) as raised:
        tokenize(write_jsonl(tmp_path / "a.jsonl", [row]), renderer)
    assert says in str(raised.value)


def test_a_table_by_another_separator_is_named(tmp_path, renderer):
    (tmp_path / "a.csv").write_text("prompt;completion\na;b\n")
    with pytest.raises(DataError, match="separated by ';'"):
        tokenize(tmp_path / "a.csv", renderer)
    (tmp_path / "a.csv").write_bytes("prompt,completion\nü,é\n".encode("latin-1"))
    with pytest.raises(DataError, match="cannot be read as UTF-8"):
        tokenize(tmp_path / "a.csv", renderer)
    (tmp_path / "a.jsonl").write_bytes(LINE.encode("utf-16"))
    with pytest.raises(DataError, match="is UTF-16"):
        tokenize(tmp_path / "a.jsonl", renderer)


def test_rows_unlike_the_first_ones_are_read(tmp_path, renderer):
    rows = [*[ROW] * 1500, {"messages": [{**ASKED, "name": "ann"}, ANSWERED], "tools": [{"name": "look"}]}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    assert '"name": "look"' in texts(path, renderer)[-1]


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="needs the shared data")
@pytest.mark.parametrize(
    ("name", "settings", "count"),
    [
        ("alpaca_en_demo.json", {}, 999),
        ("glaive_toolcall_en_demo.json", {}, 300),
        ("identity.json", {}, 91),
        ("dpo_en_demo.json", {"shape": "pair"}, 300),
        ("c4_demo.jsonl", {"shape": "document"}, 300),
        ("wiki_demo.txt", {"shape": "document"}, 30),
        ("gsm8k_train.jsonl", {"columns": ColumnsConfig(prompt="question", completion="answer")}, 7473),
        ("banking77_test.csv", {"columns": ColumnsConfig(prompt="text", completion="category")}, 3080),
    ],
)
def test_real_files(renderer, name, settings, count):
    assert len(tokenize(SHARED_DATA / name, renderer, **settings)) == count


def test_columns_that_are_not_read_are_named(tmp_path, renderer):
    lines: list[str] = []
    for row, unread in (
        ({**ROW, "id": 1, "source": "x", "tools": []}, "id, source"),
        ({"prompt": "q", "completion": "a", "system": "s", "note": "n"}, "note"),
        (ALPACA | {"text": "whole"}, "text"),
    ):
        path = write_jsonl(tmp_path / "a.jsonl", [row])
        data = DataConfig(train=str(path))
        tokenize_source("data.train", str(path), data, renderer, log=lines.append)
        assert lines.pop() == f"data.train: columns that are not read: {unread}"
    tokenize_source("data.train", str(path), DataConfig(train=str(path)), renderer, log=lines.append)


def test_pairs_whose_conversations_begin_with_the_prompt(tmp_path, renderer):
    short = {"prompt": "hi", "chosen": "good", "rejected": "bad"}
    whole = {"prompt": "hi"} | {
        key: [ASKED, {"role": "assistant", "content": short[key]}] for key in ("chosen", "rejected")
    }
    one, other = (tokenize(write_jsonl(tmp_path / "p.jsonl", [row]), renderer, shape="pair") for row in (short, whole))
    assert one.ids.tolist() == other.ids.tolist()
    assert one.trained.tolist() == other.trained.tolist()


def test_an_evaluation_row_that_ends_with_a_question_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "e.jsonl", [{"messages": [ASKED, ANSWERED, ASKED]}])
    with pytest.raises(DataError, match="row 1: ends with a question that has no answer"):
        load_questions(DataConfig(train="x", eval=str(path)))


def test_a_document_has_one_beginning_of_text(tmp_path, tiny_base):
    from tokenizers.processors import TemplateProcessing

    tokenizer = load_tokenizer(tiny_base)
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)]
    )
    path = write_jsonl(tmp_path / "d.jsonl", [{"text": "<|endoftext|>hi"}, {"text": "hi"}])
    dataset = tokenize(path, ChatRenderer(tokenizer), shape="document")
    first, second = (dataset.sequences(number)[0][0].tolist() for number in range(2))
    assert first == second
    assert first.count(tokenizer.bos_token_id) == 1


def test_a_template_that_writes_the_date_says_so_and_is_made_anew(tmp_path, tiny_base, monkeypatch):
    tokenizer = load_tokenizer(tiny_base)
    tokenizer.chat_template = "{{ strftime_now('%Y') }}" + tokenizer.chat_template
    renderer, lines = ChatRenderer(tokenizer), []
    path = write_jsonl(tmp_path / "a.jsonl", [ROW])
    found = []
    for day in ("2026-11-30", "2026-11-30", "2031-01-02"):
        monkeypatch.setattr("ftray.data.tokens.time.strftime", lambda form, day=day: day)
        how = {"kept_in": tmp_path / "kept", "log": lines.append}
        found.append(tokenize_source("data.train", str(path), DataConfig(train=str(path)), renderer, **how).directory)
    assert found[0] == found[1] != found[2]
    assert "writes today's date, 2026-11-30" in lines[0]


def test_tables_whose_cells_would_be_lost_are_refused(tmp_path):
    path = tmp_path / "a.csv"
    for content, says in (
        ('prompt,completion\nq1,"a1\nq2,a2\n', "line 2: a quote is opened there and never closed"),
        ("id,text,text\n1,a,b\n", "several columns 'text'"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=says):
            load_rows("data.train", str(path))
    path.write_text("\ufeff\n\nprompt,completion\n007,1.50\n")  # blank lines first
    assert list(load_rows("data.train", str(path))) == [{"prompt": "007", "completion": "1.50"}]
    path.write_text('prompt,completion\n5" disk,a\n')  # a quote that opens nothing
    assert list(load_rows("data.train", str(path))) == [{"prompt": '5" disk', "completion": "a"}]
    (tmp_path / "a.txt").write_text("a\u2028b\r\nc\x0cd\n")
    assert [row["text"] for row in load_rows("data.train", str(tmp_path / "a.txt"))] == ["a\u2028b", "c\x0cd"]


def test_odd_json_is_a_problem_of_its_row(tmp_path, renderer):
    lines = [LINE, "[" * 5000 + "]" * 5000, '{"n": ' + "1" * 5000 + "}", " " * 200, LINE.replace("hello", "\\ud83d")]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError) as raised:
        tokenize(tmp_path / "a.jsonl", renderer)
    for says in (
        "3 of 4 rows",
        "row 2: line 2: is nested without end",
        "row 3: line 3:",
        "row 4: a message is no Unicode",
    ):
        assert says in str(raised.value)
    (tmp_path / "b.json").write_text(json.dumps({**ROW, "data": ["x"]}))
    assert trained(tmp_path / "b.json", renderer) == ["hello<|im_end|>"]
    (tmp_path / "c.json").write_text(json.dumps([ROW]) + "\n" * 300)
    assert trained(tmp_path / "c.json", renderer) == ["hello<|im_end|>"]


@pytest.mark.parametrize("history", ["abc", [["a"]], [{"role": "user", "content": "x"}]])
def test_a_history_that_is_no_list_of_pairs(tmp_path, renderer, history):
    with pytest.raises(DataError, match="history must be a list of pairs"):
        tokenize(write_jsonl(tmp_path / "a.jsonl", [ALPACA | {"history": history}]), renderer)


def test_answers_within_a_prompt_are_not_what_is_trained(tmp_path, renderer):
    row = {"prompt": [ASKED, {"role": "assistant", "content": "before"}, ASKED], "completion": "hello"}
    assert trained(write_jsonl(tmp_path / "a.jsonl", [row]), renderer) == ["hello<|im_end|>"]


def test_a_first_row_that_is_broken_is_named_also_beside_labels(tmp_path, renderer):
    path = tmp_path / "a.jsonl"
    path.write_text("{broken\n" + json.dumps({**ROW, "label": "x"}) + "\n")
    with pytest.raises(DataError, match="row 1: line 1, column 2: is no JSON"):
        tokenize(path, renderer)
