"""The OpenAI API's requests and answers, as far as this endpoint speaks it.

A parameter it does not have is refused by name, never ignored: an answer that silently lacks what was asked for is
wrong.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ftray.infer.protocol import Sampling

DEFAULT_COMPLETION_TOKENS = 16  # of /v1/completions, as OpenAI's


class ApiRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: str
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: "StreamOptions | None" = None
    user: str | None = None
    # Accepted at their neutral values, which many clients send.
    n: Literal[1] | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logit_bias: dict[str, float] | None = Field(default=None, max_length=0)

    def sampling(self, max_tokens: int | None) -> Sampling:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            max_tokens=max_tokens,
            stop=tuple(text for text in stop if text),
        )

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: bool | None = None


class ChatRequest(ApiRequest):
    messages: list[dict[str, Any]] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: Literal[False] | None = None
    response_format: "TextFormat | None" = None

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class TextFormat(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]


class CompletionRequest(ApiRequest):
    prompt: str | list[int]
    max_tokens: int | None = Field(default=None, ge=1)
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    logprobs: None = None

    @property
    def max_new_tokens(self) -> int:
        return self.max_tokens or DEFAULT_COMPLETION_TOKENS


def error_body(message: str, *, status: int, param: str | None = None) -> dict[str, Any]:
    kinds = {404: "not_found_error", 429: "rate_limit_error", 503: "server_error", 500: "server_error"}
    code = "model_not_found" if status == 404 and param == "model" else None
    kind = kinds.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def usage_body(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
