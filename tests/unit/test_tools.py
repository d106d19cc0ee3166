"""Tool calls: how they are told to a model, forced, and found in its answer; whole and streamed."""

import json

import pytest
from fake_endpoint import ask, make_client

from ftray.errors import DataError
from ftray.infer.protocol import StructuredOutput
from ftray.model.chat import read_messages
from ftray.serve.http.ingress import Ingress
from ftray.serve.openai.calls import Call, CallFinder
from ftray.serve.routing.model_names import ModelNames
from ftray.serve.tenants.auth import Authenticator

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TIME = {"type": "function", "function": {"name": "time"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
OSLO = Call("weather", '{"city": "Oslo"}')


@pytest.fixture
def client(registry, backend):
    return make_client(Ingress(ModelNames("base-model", registry), backend, Authenticator(None)))


def found(text: str, size: int) -> list:
    """What a finder makes of a text that comes in pieces of `size` characters; neighbouring texts joined."""
    finder = CallFinder(["weather", "time"])
    parts = [part for start in range(0, len(text), size) for part in finder.push(text[start : start + size])]
    joined: list = []
    for part in [*parts, *finder.finish(is_cut=False)]:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        else:
            joined.append(part)
    return joined


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("Just words, 1 < 2.", ["Just words, 1 < 2."]),
        (f"I look. {CALL}", ["I look.", OSLO]),
        (f"{CALL}\n{CALL}", [OSLO, OSLO]),
        ('{"name": "weather", "parameters": {"city": "Oslo"}}', [OSLO]),
        ('[{"name": "weather", "arguments": {"city": "Oslo"}}, {"name": "time"}]', [OSLO, Call("time", "{}")]),
        ('{"city": "Oslo"}', ['{"city": "Oslo"}']),  # an object, but no call
        ('<tool_call>{"name": "shell", "arguments": {}}</tool_call>', None),  # no such tool
        ('<tool_call>{"name": "weather", ', ['<tool_call>{"name": "weather", ']),  # cut short
        ("<tool_call>nonsense</tool_call>", ["<tool_call>nonsense</tool_call>"]),
    ],
)
def test_calls_are_found_however_they_come(text, parts, size):
    assert found(text, size) == (parts or [text])


def test_a_call_in_an_answer(client, backend):
    backend.text, backend.end = f"I look. {CALL}", ""
    choice = ask(client, "support", tools=[WEATHER]).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "I look."
    (call,) = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Oslo"}'}
    assert call["id"].startswith("call_")
    assert backend.jobs[0].tools[0]["function"]["name"] == "weather"
    plain = ask(client, "support").json()["choices"][0]  # without tools the same answer is text
    assert (plain["finish_reason"], plain["message"]["content"]) == ("stop", backend.text)


def test_a_call_in_a_stream(client, backend):
    backend.text, backend.end = "I look. <tool_call>", CALL.removeprefix("<tool_call>") + CALL
    response = ask(client, "support", tools=[WEATHER], stream=True)
    chunks = [json.loads(line.removeprefix("data: ")) for line in response.text.split("\n\n")[:-2]]
    deltas = [chunk["choices"][0] for chunk in chunks]
    assert "".join(d["delta"].get("content") or "" for d in deltas).strip() == "I look."
    calls = [call for d in deltas for call in d["delta"].get("tool_calls", [])]
    assert [call["index"] for call in calls] == [0, 1]
    assert [call["function"]["arguments"] for call in calls] == ['{"city": "Oslo"}'] * 2
    assert deltas[-1]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize(
    ("choice", "names"),
    [("required", ["weather", "time"]), ({"type": "function", "function": {"name": "time"}}, ["time"])],
)
def test_a_forced_call_holds_the_answer_to_its_schema(client, backend, choice, names):
    backend.text, backend.end = '{"name": "time", "arguments": {}}', ""
    answer = ask(client, "support", tools=[WEATHER, TIME], tool_choice=choice).json()["choices"][0]
    assert answer["message"]["tool_calls"][0]["function"]["name"] == "time"
    assert answer["message"]["content"] is None
    structure = backend.jobs[0].sampling.structure
    assert isinstance(structure, StructuredOutput)
    schema = json.loads(structure.text)
    reported = [one["properties"]["name"]["const"] for one in schema.get("anyOf", [schema])]
    assert reported == names


def test_no_tools_are_told_where_none_may_be_used(client, backend):
    ask(client, "support", tools=[WEATHER], tool_choice="none")
    assert backend.jobs[0].tools == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tools": [TIME], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "there is no tool 'x'"),
        ({"tools": [TIME, TIME]}, "two have one name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        (
            {"tools": [TIME], "tool_choice": "required", "response_format": {"type": "json_object"}},
            "cannot be both",
        ),
    ],
)
def test_tools_that_cannot_be_are_refused(client, change, message):
    response = ask(client, "support", **change)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


# -- told to the model ---------------------------------------------------------------------------------------------

CONVERSATION = [
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Weather in "}, {"type": "text", "text": "Oslo?"}]},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "1", "content": "rain"},
]


def test_a_template_without_tools_gets_them_in_text(renderer):
    prompt = renderer.tokenizer.decode(renderer.prompt_ids(read_messages(CONVERSATION), [WEATHER]))
    assert "Be brief." in prompt
    assert '"name": "weather", "description": "Of a city"' in prompt
    assert "Weather in Oslo?" in prompt
    assert CALL in prompt
    assert "<tool_response>\nrain\n</tool_response>" in prompt
    assert "role" not in prompt


def test_a_template_that_knows_tools_tells_them_itself(renderer, monkeypatch):
    template = (
        "{% for t in tools or [] %}TOOL {{ t.function.name }}\n{% endfor %}"
        "{% for m in messages %}{{ m.role }}: {{ m.content }}"
        "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments.city }}]{% endfor %}{{ '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    monkeypatch.setattr(renderer.tokenizer, "chat_template", template)
    prompt = renderer.tokenizer.decode(renderer.prompt_ids(read_messages(CONVERSATION), [WEATHER]))
    assert prompt == (
        "TOOL weather\nsystem: Be brief.\nuser: Weather in Oslo?\nassistant: [weather Oslo]\ntool: rain\nassistant: "
    )


def test_without_tools_the_prompt_is_the_one_of_training(renderer):
    messages = [{"role": "user", "content": "hi"}, {"role": "tool", "content": "rain"}]
    prompt = renderer.prompt_ids(read_messages(messages))
    answered = renderer.training_ids([*messages, {"role": "assistant", "content": "ok"}])
    assert answered.ids[: len(prompt)].tolist() == prompt


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        ({"role": "user", "content": [{"type": "image_url"}]}, "'image_url' is not read"),
        ({"role": ["user"], "content": "x"}, "role must be a text"),
        ({"role": {"": None}, "content": "x"}, "role must be a text"),
        ({"role": "tool", "tool_call_id": 7, "content": "x"}, "tool_call_id must be a text"),
        ({"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}, "a tool call needs"),
    ],
)
def test_messages_that_cannot_be_rendered_are_refused(message, problem):
    with pytest.raises(DataError, match=problem):
        read_messages([message])
