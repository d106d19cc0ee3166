"""What clients that nobody here wrote send: fields that ask for nothing, histories with broken calls, forced calls in
streams, schemas with definitions, models by name, HEAD, slashes, browsers."""

import json

import pytest
from fake_endpoint import ask, make_client

from ftray.infer.structure import Grammars
from ftray.model.base import load_tokenizer
from ftray.model.chat import read_messages
from ftray.serve.http.ingress import Ingress
from ftray.serve.openai.json_schema import ready
from ftray.serve.openai.schemas import ChatRequest
from ftray.serve.protocol import Failed
from ftray.serve.routing.model_names import ModelNames
from ftray.serve.tenants.auth import Authenticator

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"properties": {"city": {}}}}}
TIME = {"type": "function", "function": {"name": "time"}}


@pytest.fixture
def open_endpoint(registry, backend):
    def make(**settings):
        ingress = Ingress(ModelNames("base-model", registry), backend, Authenticator(None))
        return make_client(ingress, settings=settings)

    return make


@pytest.fixture
def client(open_endpoint):
    return open_endpoint()


def message_of(answer) -> str:
    return answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"store": None, "metadata": None, "functions": None, "audio": None, "web_search_options": None},
        {"store": False, "metadata": {"a": "b"}, "service_tier": "auto", "prompt_cache_key": "k"},
        {"safety_identifier": "u", "verbosity": "medium", "functions": [], "stop_token_ids": [], "min_tokens": 0},
        {"skip_special_tokens": True, "chat_template_kwargs": {}, "modalities": ["text"], "priority": 0},
        {"best_of": 1, "echo": False, "user": 7, "suffix": "", "reasoning_effort": None},
        {"stream_options": {"include_obfuscation": False}, "prediction": {"type": "content", "content": "x"}},
        {"tools": [WEATHER | {"cache_control": {"type": "ephemeral"}}], "parallel_tool_calls": False},
        {"tool_choice": "auto"},
        {"tool_choice": "auto", "tools": []},
        {"tool_choice": "none", "tools": None},
        {"top_k": -1, "top_p": 0},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_fields_that_change_nothing_pass(client, fields):
    answer = ask(client, "support", **fields)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("store", True),
        ("service_tier", "flex"),
        ("reasoning_effort", "high"),
        ("modalities", ["text", "audio"]),
        ("web_search_options", {}),
        ("best_of", 2),
        ("min_tokens", 5),
        ("temprature", 0.5),
    ],
)
def test_others_are_refused_by_name_or_ignored_where_the_config_says_so(client, open_endpoint, field, value, caplog):
    refused = ask(client, "support", **{field: value})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == field
    assert message_of(refused) == f"{field}: this endpoint has no such parameter"
    lenient = open_endpoint(unknown_fields="ignore")
    assert ask(lenient, "support", **{field: value}).status_code == 200
    assert ask(lenient, "support", temperature=9).status_code == 400  # a known one is not ignored
    assert ask(client, "support", **{field: value}).status_code == 400


def test_top_p_of_zero_is_the_likeliest_and_top_k_of_minus_one_is_all(client, backend):
    ask(client, "support", top_p=0)
    ask(client, "support", top_k=-1)
    greedy, free = (job.sampling for job in backend.jobs)
    assert (greedy.top_k, greedy.top_p) == (1, 1.0)
    assert free.top_k == 0


def test_no_tokens_but_those_of_the_prompt(client, backend):
    def completions(**more):
        return client.post("/v1/completions", json={"model": "support", "prompt": "hi", "max_tokens": 0, **more})

    assert completions(echo=True, logprobs=1).status_code == 200
    assert backend.jobs[0].is_prompt_only
    assert "echo: true" in message_of(completions())


@pytest.mark.parametrize(
    ("body", "content_type", "message", "param"),
    [
        ('{"model": "x", }', "application/json", "the body is no JSON", None),
        ("hello", "text/plain", "a JSON object, sent with Content-Type: application/json", None),
        ('{"model": "support", "messages": [{}], "tool_choice": "required"}', None, "tool_choice needs tools", "*"),
        ('{"model": "support", "messages": [{}], "tool_choice": {"type": "any"}}', None, "tool_choice", "*"),
    ],
)
def test_words_of_refusals(client, body, content_type, message, param):
    headers = {"Content-Type": content_type or "application/json"}
    error = client.post("/v1/chat/completions", content=body, headers=headers).json()["error"]
    assert message in error["message"]
    assert "Value error" not in error["message"]
    assert error["param"] == ("tool_choice" if param == "*" else param)


def test_some_of_the_tools_may_be_allowed(client, backend):
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "time"}}]}
    ask(client, "support", tools=[WEATHER, TIME], tool_choice={"type": "allowed_tools", "allowed_tools": allowed})
    assert [tool["function"]["name"] for tool in backend.jobs[0].tools] == ["time"]
    assert '"const": "time"' in backend.jobs[0].sampling.structure.text


def test_a_long_prompt_has_openais_code(client, backend):
    backend.error = Failed(
        "This model's maximum context length is", 400, code="context_length_exceeded", param="messages"
    )
    for stream in (False, True):
        error = ask(client, "support", stream=stream).json()["error"]
        assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")


# -- calls -----------------------------------------------------------------------------------------------------------


def streamed(client, **more) -> tuple[str, list[dict], str]:
    """Content, calls put together as clients do, and the reason of the end."""
    response = ask(client, "support", stream=True, **more)
    chunks = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    content, calls = "", []
    for choice in (chunk["choices"][0] for chunk in chunks):
        content += choice["delta"].get("content") or ""
        for call in choice["delta"].get("tool_calls", []):
            if call["index"] == len(calls):
                calls.append({"id": call["id"], "name": call["function"]["name"], "arguments": []})
            calls[call["index"]]["arguments"].append(call["function"]["arguments"])
    return content, calls, chunks[-1]["choices"][0]["finish_reason"]


@pytest.mark.parametrize("cut", [5, 30, 45, 54])
def test_a_forced_call_streams_as_a_call_whole_or_cut(client, backend, cut):
    written = '{"name":"weather","arguments":{"city":"Oslo","at":{}}}'
    asked = {"tools": [WEATHER, TIME], "tool_choice": "required"}
    backend.text, backend.end = written[:20], written[20:]
    content, (call,), reason = streamed(client, **asked)
    assert (content, call["name"], reason) == ("", "weather", "tool_calls")
    assert "".join(call["arguments"]) == '{"city":"Oslo","at":{}}'
    whole = ask(client, "support", **asked).json()["choices"][0]["message"]
    assert whole["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city":"Oslo","at":{}}'}

    backend.text, backend.end, backend.reason = written[:cut], "", "length"
    content, calls, reason = streamed(client, **asked)
    choice = ask(client, "support", **asked).json()["choices"][0]
    if cut == 5:  # not even a name
        assert (content, calls) == (written[:cut], [])
        return
    assert (content, choice["message"]["content"]) == ("", None)
    assert reason == choice["finish_reason"] == ("length" if cut < len(written) else reason)
    arguments = written[30:cut] if cut < len(written) else written[30:-1]
    assert "".join(calls[0]["arguments"]) == arguments
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == arguments


def test_the_first_call_alone_where_they_may_not_be_parallel(client, backend):
    one = '<tool_call>\n{"name": "time", "arguments": {"n": 1}}\n</tool_call>'
    backend.text, backend.end = one, one.replace("1", "2")
    both = ask(client, "support", tools=[TIME]).json()["choices"][0]["message"]["tool_calls"]
    assert len(both) == 2
    first = ask(client, "support", tools=[TIME], parallel_tool_calls=False).json()["choices"][0]
    assert [call["function"]["arguments"] for call in first["message"]["tool_calls"]] == ['{"n": 1}']
    assert first["finish_reason"] == "tool_calls"
    _, calls, _ = streamed(client, tools=[TIME], parallel_tool_calls=False)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("given", "rendered"),
    [
        ("", {}),
        (None, {}),
        ('{"a": 1}', {"a": 1}),
        ({"a": 1}, {"a": 1}),
        ('{"a": ', '{"a": '),
        ("null", "null"),
        ("[1]", "[1]"),
    ],
)
def test_histories_hold_the_calls_that_models_wrote(given, rendered):
    message = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": given}}]}
    (read,) = read_messages([message])
    assert read["content"] == ""
    assert read["tool_calls"][0]["function"] == {"name": "f", "arguments": rendered}


def test_other_histories(renderer):
    talk = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
        {"role": "assistant", "content": None, "refusal": "never"},
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "function", "name": "f", "content": "rain"},
    ]
    read = read_messages(talk)
    assert [message["content"] for message in read] == ["hi", "", "no", "never", "", "rain"]
    assert read[4]["tool_calls"][0]["function"]["name"] == "f"
    assert read[5]["role"] == "tool"
    assert "rain" in renderer.tokenizer.decode(renderer.prompt_ids(read))


# -- schemas ---------------------------------------------------------------------------------------------------------

KINDS = {"$defs": {"K": {"enum": ["a", "b"]}}, "type": "object", "properties": {"k": {"$ref": "#/$defs/K"}}}
TREE = {"type": "object", "properties": {"left": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}, "required": ["left"]}


@pytest.fixture(scope="module")
def grammars(tiny_base):
    tokenizer = load_tokenizer(tiny_base)
    return Grammars(tokenizer, vocab_size=len(tokenizer), stop_ids={tokenizer.eos_token_id})


def structure_of(**more):
    request = ChatRequest.model_validate({"model": "m", "messages": [{"role": "user", "content": "x"}], **more})
    return request.sampling().structure


def tool(name: str, schema: dict) -> dict:
    return {"type": "function", "function": {"name": name, "parameters": schema}}


def matches(grammars, structure, text: str) -> bool:
    matcher = grammars.matcher(structure)._matcher
    ids = grammars._hf_tokenizer(text, add_special_tokens=False)["input_ids"]
    return matcher.validate_tokens(ids) == len(ids)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "kind"}}])
def test_a_tools_definitions_and_recursion_are_its_own(grammars, choice):
    structure = structure_of(tools=[tool("tree", TREE), tool("kind", KINDS)], tool_choice=choice)
    assert matches(grammars, structure, '{"name":"kind","arguments":{"k":"b"}}')
    assert not matches(grammars, structure, '{"name":"kind","arguments":{"k":"c"}}')
    if choice == "required":
        assert matches(grammars, structure, '{"name":"tree","arguments":{"left":{"left":null}}}')
        assert not matches(grammars, structure, '{"name":"tree","arguments":{"left":{"k":"b"}}}')


def test_a_forced_call_invents_no_keys(grammars):
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    structure = structure_of(tools=[tool("w", schema)], tool_choice="required")
    assert matches(grammars, structure, '{"name":"w","arguments":{"city":"x"}}')
    assert not matches(grammars, structure, '{"name":"w","arguments":{"city":"x","unit":"f"}}')
    assert ready(schema | {"additionalProperties": True}, closed=True)["additionalProperties"] is True
    both = {"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]}
    assert ready(both, closed=True) == both  # each part says some of the keys


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "format": "password"},
        {"type": "string", "format": "binary"},
        {"type": "array", "items": {"type": "integer"}, "uniqueItems": True},
        {"type": "object", "properties": {"format": {"type": "string", "format": "int-like"}}},
    ],
    ids=str,
)
def test_constraints_that_hold_of_everything_are_dropped(grammars, schema):
    wrapped = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    grammars.matcher(structure_of(response_format=wrapped))
    assert ready({"format": "date"}, closed=False) == {"format": "date"}


def test_refusals_of_schemas_name_tool_key_and_path(grammars):
    lookahead = {"type": "object", "properties": {"mail": {"type": "string", "pattern": "^(?!x)a$"}}}
    for tools, expected in (
        ([tool("ok", {}), tool("bad", lookahead)], r"tools[1] (bad) at /properties/mail: the pattern '^(?!x)a$'"),
        (
            [tool("ok", {}), tool("n", {"properties": {"a": {"not": {}}}})],
            "tools[1] (n) at /properties/a: not: an answer",
        ),
    ):
        with pytest.raises(Exception, match=r"look-around|keyword") as error:
            grammars.matcher(structure_of(tools=tools, tool_choice="required"))
        assert expected in str(error.value)
        assert error.value.param == "tools"
    number = {"type": "integer", "minimum": 10**20}
    one_of = {"oneOf": [{"type": "integer"}, {"type": "number"}]}
    for schema, expected in ((number, f"minimum {10**20}"), (one_of, "two of its branches can hold of one value")):
        wrapped = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        with pytest.raises(Exception, match="response_format") as error:
            grammars.matcher(structure_of(response_format=wrapped))
        assert expected in str(error.value)
        assert "coerce_one_of" not in str(error.value)


@pytest.mark.parametrize(
    "schema",
    [{"$ref": "#"}, {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}],
    ids=["itself", "in a circle"],
)
def test_what_nothing_can_match_is_refused_before_a_token(grammars, schema):
    with pytest.raises(Exception, match="does it refer to itself"):
        grammars.matcher(structure_of(response_format={"type": "json_object", "schema": schema}))


def test_what_is_nested_without_end_is_refused(client):
    schema: dict = {}
    for _ in range(900):
        schema = {"items": schema}
    wrapped = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    refused = ask(client, "support", response_format=wrapped)
    assert refused.status_code == 400
    assert "nested over 100 deep" in message_of(refused)


# -- HTTP --------------------------------------------------------------------------------------------------------------


def test_one_model_by_its_name(client):
    for name in ("base-model", "support", "support@prod", "support@1"):
        assert client.get(f"/v1/models/{name}").json()["id"] == name
    missing = client.get("/v1/models/nobody")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")


def test_head_slashes_and_stream_headers(client):
    for path in ("/", "/healthz", "/v1/models"):
        head = client.head(path)
        assert (head.status_code, head.content) == (200, b"")
    body = {"model": "support", "messages": [{"role": "user", "content": "hi"}]}
    assert client.post("/v1/chat/completions/", json=body, follow_redirects=False).status_code == 200
    streamed = ask(client, "support", stream=True)
    assert streamed.headers["cache-control"] == "no-cache"
    assert streamed.headers["x-accel-buffering"] == "no"


def test_a_callers_own_id_is_the_one_everywhere(client):
    answer = ask(client, "support", headers={"X-Request-Id": "my id\n-7"})
    assert answer.json()["id"] == "chatcmpl-myid-7"
    without = ask(client, "support")
    assert without.json()["id"] == f"chatcmpl-{without.headers['x-request-id']}"


def test_browsers_of_other_pages_where_the_config_names_them(client, open_endpoint):
    page = {"Origin": "https://chat.example.com"}
    asks = page | {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    assert "access-control-allow-origin" not in client.get("/v1/models", headers=page).headers
    named = open_endpoint(cors={"origins": ["https://chat.example.com"]})
    assert named.options("/v1/chat/completions", headers=asks).status_code == 200
    assert named.get("/v1/models", headers=page).headers["access-control-allow-origin"] == "https://chat.example.com"
    other = named.get("/v1/models", headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers


def test_no_page_loads_scripts_from_elsewhere(client):
    assert [client.get(path).status_code for path in ("/docs", "/redoc")] == [404, 404]
