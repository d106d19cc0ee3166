"""The base of every request's body: what is unknown is refused by name, unless it changes nothing."""

import json
import logging
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

MAX_DEPTH = 100  # of nested lists and objects

log = logging.getLogger("ftray.serve")

# `unknown_fields: ignore` of the endpoint: they are logged, once each, and not refused.
ignores_unknown: ContextVar[bool] = ContextVar("ignores_unknown", default=False)
logged: set[str] = set()

Changes = Callable[[Any], bool]


def only(*values: Any) -> Changes:
    return lambda given: not any(given == value and type(given) is type(value) for value in values)


def nothing(_: Any) -> bool:
    return False


# Parameters of OpenAI's and vLLM's APIs that this endpoint lacks: whether a value asks for anything. null and empty
# values ask for nothing anyway.
WITHOUT_EFFECT: dict[str, Changes] = {
    # Where and for how long the provider keeps something, and for whom: nothing is kept here.
    "store": only(False),
    "metadata": nothing,
    "prompt_cache_key": nothing,
    "prompt_cache_retention": nothing,
    "safety_identifier": nothing,
    "cache_control": nothing,
    "service_tier": only("auto", "default"),
    # A guess of the answer, which saves time and changes nothing.
    "prediction": nothing,
    # What is so here anyway.
    "modalities": only(["text"]),
    "verbosity": only("medium"),
    "reasoning_effort": only("none"),
    "function_call": only("none", "auto"),
    "include_obfuscation": only(False),
    "best_of": only(1),
    "echo": only(False),
    "min_tokens": only(0),
    "priority": only(0),
    "use_beam_search": only(False),
    "length_penalty": only(1, 1.0),
    "skip_special_tokens": only(True),
    "spaces_between_special_tokens": only(True),
    "include_stop_str_in_output": only(False),
    "add_generation_prompt": only(True),
    "continue_final_message": only(False),
}


def asks_for_something(name: str, value: Any) -> bool:
    if value is None or (isinstance(value, str | list | dict) and not value and name != "web_search_options"):
        return False
    return WITHOUT_EFFECT.get(name, lambda _: True)(value)


class Body(BaseModel):
    """Of a request, or a part of one."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def without_what_changes_nothing(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        names = {field.alias or name for name, field in cls.model_fields.items()}
        unknown = [name for name in given if name not in names]
        dropped = {name for name in unknown if not asks_for_something(str(name), given[name])}
        if ignores_unknown.get():
            for name in sorted(set(unknown) - dropped - logged):
                logged.add(name)
                log.warning("parameter %.100r is ignored (unknown_fields: ignore)", name)
            dropped = set(unknown)
        return {name: value for name, value in given.items() if name not in dropped}


class RequestBody(Body):
    @model_validator(mode="before")
    @classmethod
    def of_whole_characters(cls, given: Any) -> Any:
        """JSON can say half of a surrogate pair, which is no text: neither a tokenizer nor an answer could hold it."""
        if any(depth > MAX_DEPTH for depth in depths(given)):
            raise ValueError(f"lists and objects are nested over {MAX_DEPTH} deep")
        try:
            if isinstance(given, dict):
                json.dumps(given, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError:
            raise ValueError("the text holds half of a surrogate pair, which is no character") from None
        return given


def depths(value: Any) -> Iterator[int]:
    """Of every list and object in it."""
    waiting = [(value, 1)]
    while waiting:
        inner, depth = waiting.pop()
        if isinstance(inner, dict | list):
            yield depth
            waiting += [(part, depth + 1) for part in (inner.values() if isinstance(inner, dict) else inner)]
