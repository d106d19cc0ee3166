"""The OpenAI API's requests and answers, as far as this endpoint speaks it.

A parameter it does not have is refused by name, never ignored: an answer that silently lacks what was asked for is
wrong. One that asks for nothing (null, empty, the usual value) passes, as clients send many of those (`body.py`).
"""

import json
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from ftray.infer.protocol import SamplingParams, StructuredOutput
from ftray.serve.openai.body import Body, RequestBody
from ftray.serve.openai.json_schema import ready
from ftray.serve.openai.tools import AllowedTools, Choice, NamedTool, Tool, forced

DEFAULT_COMPLETION_TOKENS = 16  # of /v1/completions, as OpenAI's
MAX_LOGPROBS = 20
MAX_ANSWERS = 128
MAX_PROMPTS = 256
MAX_TOOLS = 128
MAX_STOPS = 16  # each is looked for in every step
StopText = Annotated[str, Field(max_length=256)]
# A number is a name too.
UserName = Annotated[str, BeforeValidator(lambda given: str(given) if type(given) is int else given)]


class ApiRequest(RequestBody):
    model: str
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    seed: int | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: "StreamOptions | None" = None
    user: UserName | None = None
    n: int | None = Field(default=None, ge=1, le=MAX_ANSWERS)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = Field(default=None, max_length=1024)
    response_format: "ResponseFormat | None" = None
    # Beyond OpenAI's, under the names that vLLM uses.
    top_k: int | None = Field(default=None, ge=-1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, ge=0.1, le=10)
    ignore_eos: bool | None = None
    cache_salt: Annotated[str, Field(max_length=256)] | None = None

    @property
    def max_new_tokens(self) -> int | None:
        raise NotImplementedError

    @property
    def num_logprobs(self) -> int | None:
        raise NotImplementedError

    def sampling(self) -> SamplingParams:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        given = {
            "temperature": self.temperature,
            "top_p": self.top_p or None,
            "top_k": 1 if self.top_p == 0 else max(self.top_k or 0, 0),  # an empty nucleus is the likeliest; -1: all
            "min_p": self.min_p,
            "frequency_penalty": self.frequency_penalty,
            "presence_penalty": self.presence_penalty,
            "repetition_penalty": self.repetition_penalty,
            "logit_bias": self.logit_bias,
            "n": self.n,
            "ignore_eos": self.ignore_eos,
        }
        return SamplingParams(
            seed=self.seed,
            max_tokens=self.max_new_tokens,
            stop=tuple(text for text in stop if text),
            logprobs=self.num_logprobs,
            structure=self.response_format.structure if self.response_format is not None else None,
            **{name: value for name, value in given.items() if value is not None},
        )

    @property
    def wants_echo(self) -> bool:
        return False

    @property
    def wants_answer(self) -> bool:
        return True

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class StreamOptions(Body):
    include_usage: bool | None = None


class ChatRequest(ApiRequest):
    messages: list[dict[str, Any]] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    tools: list[Tool] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_choice: Choice | None = None
    parallel_tool_calls: bool | None = None  # false: of the calls that the model writes the first is given

    @model_validator(mode="after")
    def a_choice_of_tools(self):
        names = [tool.function.name for tool in self.tools or []]
        if self.tool_choice not in (None, "none", "auto") and not names:
            raise ValueError("tool_choice needs tools")
        if isinstance(self.tool_choice, NamedTool | AllowedTools):
            for name in self.tool_choice.names:
                if name not in names:
                    raise ValueError(f"tool_choice: there is no tool {name!r}")
        if len(set(names)) < len(names):
            raise ValueError("tools: two have one name")
        if self.must_call is not None and self.response_format is not None and self.response_format.structure:
            raise ValueError("response_format: the answer cannot be both that and the tool call that tool_choice wants")
        return self

    @property
    def usable_tools(self) -> list[Tool]:
        """What the model is told of."""
        if isinstance(self.tool_choice, AllowedTools):
            return [tool for tool in self.tools or [] if tool.function.name in self.tool_choice.names]
        return [] if self.tool_choice == "none" else list(self.tools or [])

    @property
    def must_call(self) -> StructuredOutput | None:
        choice = self.tool_choice.mode if isinstance(self.tool_choice, AllowedTools) else self.tool_choice
        return forced(self.usable_tools, choice or "auto", all_tools=self.tools or [])

    def sampling(self) -> SamplingParams:
        sampling = super().sampling()
        return replace(sampling, structure=self.must_call) if self.must_call is not None else sampling

    @model_validator(mode="after")
    def logprobs_asked_for(self):
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class JsonSchema(Body):
    """OpenAI's wrapper around a schema."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    name: str
    description: str | None = None
    body: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    type: Literal["text", "json_object", "json_schema", "regex"]
    json_schema: JsonSchema | None = None
    regex: str | None = None
    body: dict[str, Any] | None = Field(default=None, alias="schema")  # beside json_object, as llama.cpp has it

    @model_validator(mode="after")
    def complete(self):
        for kind in ("json_schema", "regex"):
            if (self.type == kind) != (getattr(self, kind) is not None):
                raise ValueError(f"type {self.type!r} and the field {kind!r} do not go together")
        if self.body is not None and self.type != "json_object":
            raise ValueError(f"type {self.type!r} and the field 'schema' do not go together")
        return self

    @property
    def structure(self) -> StructuredOutput | None:
        if self.type == "text":
            return None
        if self.regex is not None:
            return StructuredOutput("regex", self.regex)
        if self.json_schema is None:
            schema = ready(self.body or {"type": "object"}, closed=False)
        else:
            schema = ready(self.json_schema.body, closed=bool(self.json_schema.strict))
        return StructuredOutput("json_schema", json.dumps(schema))


# One text or several, each as a string or as token ids.
Inputs = Annotated[str | list[int] | list[str] | list[list[int]], Field(union_mode="left_to_right")]


def as_list(texts: Inputs) -> list[Any]:
    one = isinstance(texts, str) or (texts and isinstance(texts[0], int))
    return [texts] if one else list(texts)


class CompletionRequest(ApiRequest):
    prompt: Inputs
    max_tokens: int | None = Field(default=None, ge=0)
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def some_prompts(self):
        if self.prompt == []:
            raise ValueError("prompt is an empty list")
        if len(self.prompts) > MAX_PROMPTS:
            raise ValueError(f"prompt: at most {MAX_PROMPTS} prompts in one request")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: 0 gives nothing but the prompt's tokens, and those with echo: true alone")
        return self

    @property
    def prompts(self) -> list[Any]:
        """Each one text or token ids."""
        return as_list(self.prompt)

    @property
    def max_new_tokens(self) -> int:
        if self.max_tokens is None:
            return DEFAULT_COMPLETION_TOKENS
        return max(self.max_tokens, 1)  # of 0 the engine computes one, which is not shown

    @property
    def wants_answer(self) -> bool:
        return self.max_tokens != 0

    def sampling(self) -> SamplingParams:
        return replace(super().sampling(), prompt_logprobs=self.logprobs if self.echo else None)

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def wants_echo(self) -> bool:
        return bool(self.echo)


class AdapterRequest(RequestBody):
    """Of the endpoint's own routes."""

    model: str


def error_body(message: str, status: int, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    kinds = {
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        429: "rate_limit_error",
    }
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def usage_body(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }
