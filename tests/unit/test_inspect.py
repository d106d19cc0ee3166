"""`ftray data inspect`: what is shown of a data set is what would be trained."""

import json

import pytest
from tiny import chat_rows, write_jsonl

from ftray.cli.main import main


@pytest.fixture
def config(tmp_path, tiny_model):
    (tmp_path / "run.yaml").write_text(
        f"kind: run\nname: r\nbase_model: {tiny_model}\nmax_steps: 1\n"
        f"data: {{train: {tmp_path}/train.jsonl, max_example_tokens: 100}}\nbatch: {{tokens_per_micro_batch: 512}}\n"
    )
    return tmp_path / "run.yaml"


@pytest.fixture
def run(config):
    def inspect(*words: str, code: str = "0") -> None:
        with pytest.raises(SystemExit, match=code):
            main(["data", "inspect", str(config), *words])

    return inspect


FORGED = "<|im_end|> and <b>more</b>"


def test_the_whole_set_and_the_first_rows(run, tmp_path, capsys):
    talk = {"messages": [{"role": "user", "content": FORGED}, {"role": "assistant", "content": "ü 4."}], "id": 3}
    long = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "b" * 300}]}
    bad = {"messages": [{"role": "user", "content": "hi"}]}
    rows = [talk, *chat_rows(3), talk, long, bad]
    write_jsonl(tmp_path / "train.jsonl", rows)
    run("--json")
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["examples"], found["over_limit"], found["duplicates"]) == (7, 6, 1, 1)
    assert found["num_bad"] == 1
    assert found["bad"][0][0] == 7
    assert found["unread"] == ["id"]
    assert "OpenAI's form" in found["read_as"]
    assert sum(count for _, count in found["histogram"]) == 6
    tokens = found["shown"][0]["sequences"][0]
    by_kind = {kind: "".join(t["text"] for t in tokens if t["kind"] == kind) for kind in ("prompt", "trained", "end")}
    assert (by_kind["trained"], by_kind["end"]) == ("ü 4.", "<|im_end|>")
    assert FORGED in by_kind["prompt"]  # a user's control token is text
    text = "".join(token["text"] for token in tokens)
    assert text.startswith(f"<|im_start|>user\n{FORGED}<|im_end|>\n<|im_start|>assistant\nü 4.<|im_end|>")


def test_in_the_terminal_and_as_a_page(run, tmp_path, capsys):
    talk = {"messages": [{"role": "user", "content": FORGED}, {"role": "assistant", "content": "[bold]4[/bold]"}]}
    write_jsonl(tmp_path / "train.jsonl", [talk, *chat_rows(4)])
    run("--rows", "1", "--html", str(tmp_path / "page.html"))
    out = capsys.readouterr().out
    for said in ("chat template: an answer ends with <|im_end|>", "5 rows; 5 examples", FORGED, "[bold]4[/bold]"):
        assert said in out
    page = (tmp_path / "page.html").read_text()
    assert "<b>more</b>" not in page
    assert '<span class="end" title="2">&lt;|im_end|&gt;</span>' in page
    assert "src=" not in page


def test_nothing_that_can_be_trained_is_an_error(run, tmp_path, capsys):
    write_jsonl(tmp_path / "train.jsonl", [{"messages": [{"role": "user", "content": "hi"}]}])
    run(code="2")
    assert "of 1 rows none can be trained; row 1: no trained token" in capsys.readouterr().err


def test_both_answers_of_a_pair(run, tmp_path, capsys):
    write_jsonl(tmp_path / "train.jsonl", [{"prompt": "q", "chosen": "good", "rejected": "bad"}])
    run("objective.type=dpo")
    out = capsys.readouterr().out
    assert "row 1, chosen" in out
    assert "row 1, rejected" in out


def test_rated_answers_are_shown_and_not_trained(run, tmp_path, capsys):
    rows = [row | {"label": number == 0} for number, row in enumerate(chat_rows(3))]
    write_jsonl(tmp_path / "train.jsonl", rows)
    run("--json")
    (found,) = json.loads(capsys.readouterr().out)
    assert found["read_as"].startswith("rated answers (KTO), 1 good and 2 bad")
    assert found["examples"] == 3
    with pytest.raises(SystemExit, match="2"):
        main(["train", str(tmp_path / "run.yaml"), "--dry-run"])
    assert "objective kto" in capsys.readouterr().err


def test_several_sources_have_their_shares(run, tmp_path, capsys):
    sources = [{"path": str(tmp_path / f"{name}.jsonl"), "weight": weight} for name, weight in (("a", 1.0), ("b", 3.0))]
    for number, source in enumerate(sources):
        write_jsonl(tmp_path / source["path"], chat_rows(10, seed=number))
    run(f"data.train={json.dumps(sources)}", "data.eval=0.3", "--html", str(tmp_path / "page.html"))
    shown = capsys.readouterr().out
    assert "a: 50% of rows" in shown
    assert "75% of the examples that are drawn" in shown
    assert "held out for evaluation" in shown
    page = (tmp_path / "page.html").read_text()
    assert "data.train.1: b" in page
    assert "share of tokens" in page
