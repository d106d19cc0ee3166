"""Tools as a request has them, and what it asks of their calls. Where it forces one, the answer is held to the call's
JSON schema."""

import json
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from ftray.infer.protocol import StructuredOutput
from ftray.serve.openai.body import Body
from ftray.serve.openai.json_schema import COMPOSED, ready, under


class Function(Body):
    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @property
    def schema(self) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.parameters if self.parameters is not None else {"type": "object", "properties": {}}


class Tool(Body):
    type: Literal["function"]
    function: Function


class FunctionName(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: FunctionName

    @property
    def names(self) -> list[str]:
        return [self.function.name]


class AllowedNames(Body):
    mode: Literal["auto", "required"]
    tools: list[NamedTool]


class AllowedTools(Body):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedNames

    @property
    def names(self) -> list[str]:
        return [tool.function.name for tool in self.allowed_tools.tools]

    @property
    def mode(self) -> Literal["auto", "required"]:
        return self.allowed_tools.mode


Choice = Literal["none", "auto", "required"] | NamedTool | AllowedTools


def as_given(tools: Sequence[Tool]) -> tuple[dict[str, Any], ...]:
    """As the request had them, for the template."""
    return tuple(tool.model_dump(exclude_none=True) for tool in tools)


def forced(
    tools: Sequence[Tool], choice: Literal["none", "auto", "required"] | NamedTool, *, all_tools: Sequence[Tool]
) -> StructuredOutput | None:
    """What the answer must be if it must be a call of one of `tools`. `all_tools`: for their places in messages."""
    if choice in ("none", "auto"):
        return None
    possible = [tool for tool in tools if not isinstance(choice, NamedTool) or tool.function.name in choice.names]
    calls, parts = [], []
    for number, tool in enumerate(possible):
        pointer = f"{'' if len(possible) == 1 else f'/anyOf/{number}'}/properties/arguments"
        schema = tool.function.schema
        if not any(key in schema for key in ("type", *COMPOSED)):
            schema = {"type": "object"} | schema
        parameters = under(ready(schema, closed=True), pointer)
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": tool.function.name}, "arguments": parameters},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
        parts.append((pointer, f"tools[{all_tools.index(tool)}] ({tool.function.name})"))
    return StructuredOutput("json_schema", json.dumps(calls[0] if len(calls) == 1 else {"anyOf": calls}), tuple(parts))
