"""Calls as each template renders them are read back as they were: what is trained is what an endpoint reads."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from chat_templates import NAMES, answer, template_of, tokenizer_of, user

from ftray.errors import DataError
from ftray.infer.call_formats import read_gemma, read_mistral, read_python, read_tagged
from ftray.infer.calls import answer_stream
from ftray.infer.text import TextStream
from ftray.model.chat import ChatRenderer, read_messages
from ftray.serve.openai.calls import Call, CallFinder

OURS = Path(__file__).parents[1] / "templates"
OWN = sorted(path.stem for path in OURS.glob("*.jinja"))
PROPERTIES = {
    "city": {"type": "string"},
    "n": {"type": "integer"},
    "exact": {"type": "boolean"},
    "days": {"type": "array", "items": {"type": "string"}},
    "range": {"type": "object"},
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "description": "Of a city",
            "parameters": {"type": "object", "properties": PROPERTIES, "required": ["city"]},
        },
    }
]
ARGUMENTS = {"city": 'Rome, "old"\n<b>', "n": 2, "exact": True, "days": ["a", "b: c"], "range": {"low": 1.5}}
PLAIN = {"city": "007"}  # a text that looks like a number stays one


def renderer_of(name: str) -> ChatRenderer:
    return ChatRenderer(
        tokenizer_of(name, template_of(name) if name in NAMES else (OURS / f"{name}.jinja").read_text())
    )


def called(*arguments: dict) -> list[dict]:
    return [
        {"id": f"call0000{number}", "type": "function", "function": {"name": "look", "arguments": given}}
        for number, given in enumerate(arguments)
    ]


def streamed(renderer: ChatRenderer, prompt: Sequence[int], ids: Sequence[int], *, is_cut: bool = False) -> tuple:
    """(thought, text, calls) as an endpoint tells them, token by token."""
    stream = answer_stream(renderer.template, renderer.tokenizer, prompt, tools=TOOLS)
    shown, finder = TextStream(renderer.tokenizer, ()), CallFinder(["look"])
    thought, parts = "", []
    for place, token in enumerate(ids):
        is_last = place + 1 == len(ids)
        ends = token in renderer.stop_ids
        text = "" if ends else shown.push(token)
        text += shown.finish() if is_last else ""
        if stream is not None:
            more, text = stream.push(None if ends else token, text, is_last=is_last)
            thought += more
        parts += finder.push(text)
    parts += finder.finish(is_cut=is_cut)
    text = "".join(part for part in parts if isinstance(part, str))
    return thought, text, [part for part in parts if isinstance(part, Call)]


def rendered(renderer: ChatRenderer, turn: dict) -> tuple[list[int], list[int]]:
    """(prompt, what the model is trained to write)."""
    messages = read_messages([user("How?"), turn])
    (example,) = renderer.training_examples(messages, TOOLS)
    prompt = renderer.prompt_ids(messages[:1], TOOLS)
    return prompt, example.ids[example.trained].tolist()


TURNS = {
    "one": answer("", tool_calls=called(ARGUMENTS)),
    "text": answer("", tool_calls=called(PLAIN)),
    "two": answer("", tool_calls=called(ARGUMENTS, PLAIN)),
    "words": answer("Let me look.", tool_calls=called(ARGUMENTS)),
    "thought": answer("", reasoning_content="I look.", tool_calls=called(ARGUMENTS)),
    "no call": answer("Sunny <b> {1}."),
}
# What their templates have no words for, by turn.
REFUSED = {
    "two": {"llama3_1", "llama3_2", "gptoss"},
    "words": {"llama3_1", "llama3_2", "muse_glimmer", "mistral_nemo_original", "mistral_small_3_2_original"},
}
# Their template writes words beside a call as a thought.
WORDS_ARE_THOUGHTS = {"gptoss"}


@pytest.mark.parametrize("name", [*NAMES, *OWN])
@pytest.mark.parametrize("turn", TURNS)
def test_what_is_trained_is_read_back(name, turn):
    renderer = renderer_of(name)
    try:
        prompt, ids = rendered(renderer, TURNS[turn])
    except DataError as error:
        has_no_thoughts = any(words in str(error) for words in ("no place for reasoning_content", "must have none"))
        if not (turn == "thought" and has_no_thoughts) and name not in REFUSED.get(turn, ()):
            raise
        return
    assert name not in REFUSED.get(turn, ())
    thought, text, calls = streamed(renderer, prompt, ids)
    expected = [call["function"]["arguments"] for call in TURNS[turn].get("tool_calls", [])]
    assert [json.loads(call.arguments) for call in calls] == expected
    words = TURNS[turn]["content"]
    if name in WORDS_ARE_THOUGHTS and expected and words:
        text = thought
    assert text.strip() == words
    if turn == "thought":
        assert thought == "I look."


@pytest.mark.parametrize("name", [*NAMES, *OWN])
def test_no_call_is_lost_where_an_answer_is_cut(name):
    """At every token: what was cut within a call is told as words or as a part of a call, never as another call."""
    renderer = renderer_of(name)
    prompt, ids = rendered(renderer, TURNS["text"])
    for length in range(1, len(ids) - 1):
        _, text, calls = streamed(renderer, prompt, ids[:length], is_cut=True)
        for call in calls:
            assert '{"city": "007"}'.startswith(call.arguments) or json.loads(call.arguments) in (PLAIN, {}), text


def test_words_that_only_begin_like_a_call_are_words():
    renderer = renderer_of("qwen3_coder")
    for text in ("a <tool_", "<tool_call>no call</tool_call> b", "<tool_call><function=", "x < y </tool_call>"):
        ids = renderer.tokenizer(text)["input_ids"]
        assert streamed(renderer, [], ids)[1:] == (text, [])


def function(value: str, key: str = "n") -> str:
    return f"\n<function=look>\n<parameter={key}>\n{value}\n</parameter>\n</function>\n"


GEMMAS = 'call:look{a:<|"|>x, y: {z}<|"|>,b:[1,<|"|>c<|"|>],d:{e:true}}'


@pytest.mark.parametrize(
    ("read", "text", "arguments"),
    [
        (read_tagged, '{"name": "look", "arguments": {"a": 1}}', {"a": 1}),
        (read_tagged, function("3"), {"n": 3}),
        (read_tagged, function("three"), {"n": "three"}),
        (read_tagged, function("True", "exact"), {"exact": True}),
        (read_tagged, function("3", "city"), {"city": "3"}),
        (read_tagged, function("3", "unknown"), {"unknown": "3"}),
        (read_tagged, "look\n<arg_key>n</arg_key>\n<arg_value>3</arg_value>", {"n": 3}),
        (read_tagged, "look", {}),
        (read_tagged, "two words", None),
        (read_mistral, ' [{"name": "look", "arguments": {}, "id": "abc"}]', {}),
        (read_mistral, 'look[CALL_ID]abc123[ARGS]{"a": "b"}', {"a": "b"}),
        (read_mistral, "look[ARGS]{", None),
        (read_python, "[look(city='Rome', exact=true, days=['a'])]", {"city": "Rome", "exact": True, "days": ["a"]}),
        (read_python, "[look(city='a\nb')]", {"city": "a\nb"}),
        (read_python, "[look('Rome')]", None),
        (read_python, "[look(city=open('x'))]", None),
        (read_gemma, GEMMAS, {"a": "x, y: {z}", "b": [1, "c"], "d": {"e": True}}),
        (read_gemma, "call:look{a:", None),
    ],
)
def test_formats(read, text, arguments):
    expected = None if arguments is None else [("look", arguments)]
    assert read(text, {"look": {"properties": PROPERTIES}}) == expected
