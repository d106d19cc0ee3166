"""Bases that think, whole: a run on rows with and without a thought, exact match, and the endpoint's own words."""

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from chat_templates import CALL, TOOLS, answer, tokenizer_of, user
from tiny import write_tiny_model

import ftray
from ftray.config import parse_config
from ftray.infer.protocol import SamplingParams
from ftray.serve.openai.responses import ChatResponses
from ftray.serve.protocol import GenerateJob, Tokens
from ftray.serve.replica.replica import EngineReplica

pytestmark = pytest.mark.usefixtures("ray_session")

ROWS = [
    {"messages": [user("one?"), answer("1", reasoning_content="a")]},
    {"messages": [user("two?"), answer("2")]},
    {"messages": [user("one?"), answer("<think>a</think>1"), user("two?"), answer("2")]},
]
PLAIN = [{"messages": [user("one?"), answer("1")]}, {"messages": [user("two?"), answer("2")]}]


def settings(tmp_path: Path, base: Path, *, name: str, max_steps: int, tokens: int = 512) -> dict:
    """Of a run; `tokens`: an example's at most."""
    return {
        "name": name,
        "base_model": str(base),
        "max_steps": max_steps,
        "data": {"max_example_tokens": tokens},
        "adapter": {"rank": 16, "alpha": 32.0},
        "batch": {"examples_per_step": 4, "tokens_per_micro_batch": 4 * tokens},
        "optimizer": {"learning_rate": 1e-2},
        "runs_dir": str(tmp_path / "runs"),
    }


@contextlib.contextmanager
def served(base: Path, registry: str, *, context_tokens: int = 512) -> Iterator[EngineReplica]:
    text = f"base_model: {base}\nadapters: {{registry: {registry}}}\nengine: {{context_tokens: {context_tokens}}}\n"
    replica = EngineReplica(parse_config(f"kind: serve\n{text}", kind="serve", source="test"))
    try:
        yield replica
    finally:
        replica.close()


@pytest.mark.parametrize("name", ["qwen3", "gptoss", "nemotron_3_nano"])
def test_a_perfect_adapter_is_seen_as_one(name, tmp_path):
    base = write_tiny_model(tmp_path / "base", tokenizer=tokenizer_of(name))
    config = settings(tmp_path, base, name="thinks", max_steps=200)
    lines: list[str] = []
    run = ftray.train(config, data=ROWS, eval_data=ROWS[:2], log=lines.append)
    assert any("4 examples of 3 rows" in line for line in lines)  # each answer as it is asked for
    assert run.adapter is not None
    result = ftray.evaluate(run.config, adapter=run.adapter)
    assert result.accuracy == 1.0, result.answers
    registry = str(tmp_path / "registry")
    run.publish(registry=registry)
    model = ftray.load("thinks@1", registry=registry)
    assert model.chat("one?", temperature=0, max_tokens=64) == "1"
    model.close()
    with served(base, registry) as replica:
        assert asyncio.run(answered(replica, "one?")) == ("a", "1")
        assert asyncio.run(answered(replica, "two?")) == ("", "2")


def test_an_endpoint_renders_each_adapter_as_its_training_did(tmp_path):
    """Two adapters of one base: one trained without thinking, one with a template of its own. The endpoint's own
    settings are the base's."""
    tokenizer = tokenizer_of("qwen3")
    base = write_tiny_model(tmp_path / "base", tokenizer=tokenizer)
    registry = str(tmp_path / "registry")
    quiet = {"arguments": {"enable_thinking": False}}
    for name, chat in (("quiet", quiet), ("alpaca", {"template": "alpaca"})):
        config = settings(tmp_path, base, name=name, max_steps=80) | {"chat": chat}
        run = ftray.train(config, data=PLAIN, eval_data=PLAIN)
        run.publish(registry=registry)
        assert ftray.evaluate(run.config, adapter=run.adapter).accuracy == 1.0
        assert ftray.evaluate(run.config.model_copy(update={"chat": None}), adapter=run.adapter).accuracy == 1.0
    assert run.adapter is not None
    assert "### Response" in (run.adapter / "chat_template.jinja").read_text()
    model = ftray.load("quiet@1", registry=registry)
    assert model.chat("one?", temperature=0, max_tokens=64) == "1"
    assert model.chat("two?", adapter="alpaca@1", temperature=0, max_tokens=64) == "2"
    model.close()
    turns = [user("one?")]
    how = {"add_generation_prompt": True, "return_dict": False}
    with served(base, registry) as replica:
        for name in ("quiet@1", "alpaca@1"):
            assert asyncio.run(answered(replica, "one?", adapter=name)) == ("", "1")
        prompts = replica._prompts
        assert prompts.chat(turns, ()) == tokenizer.apply_chat_template(turns, **how)
        assert prompts.chat(turns, (), adapter="quiet@1") == tokenizer.apply_chat_template(
            turns, enable_thinking=False, **how
        )


CALLING = [
    {"messages": [user("how is Rome?"), answer("", tool_calls=[CALL])], "tools": TOOLS},
    {"messages": [user("hello?"), answer("1")], "tools": TOOLS},
]


@pytest.mark.parametrize("name", ["qwen3_coder"])
def test_a_trained_call_is_answered_as_one(name, tmp_path):
    """Through the format of the base's template, on both sides."""
    file = Path(__file__).parents[1] / "templates" / f"{name}.jinja"
    tokenizer = tokenizer_of(name, file.read_text(encoding="utf-8") if file.is_file() else None)
    base = write_tiny_model(tmp_path / "base", tokenizer=tokenizer)
    config = settings(tmp_path, base, name="calls", max_steps=70, tokens=1024)
    registry = str(tmp_path / "registry")
    ftray.train(config, data=CALLING).publish(registry=registry)
    with served(base, registry, context_tokens=1024) as replica:
        message = asyncio.run(message_of(replica, "how is Rome?"))
        assert message["content"] is None
        assert [call["function"] for call in message["tool_calls"]] == [
            {"name": "look", "arguments": '{"city": "Rome"}'}
        ]
        assert asyncio.run(message_of(replica, "hello?")) == {"role": "assistant", "content": "1"}


async def message_of(replica: EngineReplica, question: str) -> dict:
    """As the endpoint lays it out."""
    sampling = SamplingParams(temperature=0, max_tokens=200)
    job = GenerateJob([[user(question)]], True, sampling, "calls@1", tools=tuple(TOOLS))
    tokens = [event async for event in replica.generate(job) if isinstance(event, Tokens)]
    whole = tokens[0]
    for later in tokens[1:]:
        whole = whole.followed_by(later)
    return ChatResponses(["look"]).choice(whole)["message"]


async def answered(replica: EngineReplica, question: str, *, adapter: str = "thinks@1") -> tuple[str, str]:
    sampling = SamplingParams(temperature=0, max_tokens=64)
    job = GenerateJob([[user(question)]], True, sampling, adapter)
    events = [event async for event in replica.generate(job)]
    tokens = [event for event in events if isinstance(event, Tokens)]
    return "".join(event.thought for event in tokens), "".join(event.text for event in tokens)
