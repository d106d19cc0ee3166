"""Tool calls: what a request asks of them, and how they are found in what a model writes.

A call is `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` (Hermes, Qwen), or an answer that is nothing but
such an object or a list of them, with `arguments` or `parameters` (Llama 3, Mistral). Where the request forces a call,
the answer is held to its JSON schema.
"""

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ftray.infer.protocol import StructuredOutput
from ftray.infer.text import overlap
from ftray.model.tool_prompt import CLOSING, OPENING


class Function(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @property
    def schema(self) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.parameters if self.parameters is not None else {"type": "object", "properties": {}}


class Tool(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["function"]
    function: Function


class FunctionName(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str


class NamedTool(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["function"]
    function: FunctionName


Choice = Literal["none", "auto", "required"] | NamedTool


def as_given(tools: Sequence[Tool]) -> tuple[dict[str, Any], ...]:
    """As the request had them, for the template."""
    return tuple(tool.model_dump(exclude_none=True) for tool in tools)


def forced(tools: Sequence[Tool], choice: Choice) -> StructuredOutput | None:
    """What the answer must be if it must be a call."""
    if choice in ("none", "auto"):
        return None
    names = [choice.function.name] if isinstance(choice, NamedTool) else [tool.function.name for tool in tools]
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool.function.name}, "arguments": tool.function.schema},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
        if tool.function.name in names
    ]
    return StructuredOutput("json_schema", json.dumps(calls[0] if len(calls) == 1 else {"anyOf": calls}))


@dataclass(frozen=True)
class Call:
    name: str
    arguments: str  # JSON

    def body(self) -> dict[str, Any]:
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


Part = str | Call


class CallFinder:
    """The calls in an answer that comes in pieces. Text that may be the beginning of a call is held back."""

    def __init__(self, names: Sequence[str]):
        self._names = frozenset(names)
        self._held = ""
        self._begun = False  # something other than white space has been seen
        self._is_object = False  # the answer begins like a bare call: known at its end

    def push(self, text: str) -> list[Part]:
        self._held += text
        if not self._begun and self._held.strip():
            self._begun = True
            self._is_object = self._held.lstrip()[0] in "{["
        if not self._begun or self._is_object:
            return []
        parts: list[Part] = []
        while (start := self._held.find(OPENING)) >= 0:
            end = self._held.find(CLOSING, start)
            if end < 0:
                break
            block = self._held[start + len(OPENING) : end]
            whole = self._held[start : end + len(CLOSING)]
            parts += [self._held[:start].rstrip(), *(calls_in(block, self._names) or [whole])]
            self._held = self._held[end + len(CLOSING) :].lstrip()
        cut = start if start >= 0 else len(self._held) - overlap(self._held, OPENING)
        cut = len(self._held[:cut].rstrip())  # white space around a call belongs to it
        parts.append(self._held[:cut])
        self._held = self._held[cut:]
        return [part for part in parts if part != ""]

    def finish(self) -> list[Part]:
        """What was held back. An answer that was cut short has its beginning of a call as text."""
        rest, self._held = self._held, ""
        if self._is_object and (calls := calls_in(rest, self._names)):
            return list(calls)
        return [rest] if rest else []


def calls_in(text: str, names: frozenset[str]) -> list[Call] | None:
    """None where it is something else."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    calls = [call_of(entry, names) for entry in (found if isinstance(found, list) else [found])]
    return None if None in calls or not calls else [call for call in calls if call is not None]


def call_of(entry: Any, names: frozenset[str]) -> Call | None:
    if not isinstance(entry, Mapping) or entry.get("name") not in names:
        return None
    arguments = entry.get("arguments", entry.get("parameters", {}))
    if not isinstance(arguments, Mapping):
        return None
    return Call(entry["name"], json.dumps(arguments, ensure_ascii=False))
