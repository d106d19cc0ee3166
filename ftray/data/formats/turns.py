"""Columns that hold turns, however they are written: OpenAI's messages, ShareGPT's, a text."""

import json
from collections.abc import Sequence
from typing import Any

from ftray.config.data import ColumnsConfig
from ftray.data.formats.protocol import Conversation
from ftray.errors import DataError
from ftray.model.chat import Message, read_messages as read_plain

# ShareGPT's names of who speaks, in lower case.
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "function_call",
}
# Of a message: whether it is trained. OpenAI's, axolotl's, and one that LLaMA-Factory and others have.
WEIGHTS = ("weight", "train", "loss_weight")


def read_conversation(value: Any, *, tools: Any = None, system: Any = None) -> Conversation:
    """`tools` and `system`: of the columns beside it. Raises `DataError`."""
    turns = turns_in(value)
    messages = messages_of(turns)
    if system not in (None, ""):
        if messages[0]["role"] == "system":
            raise DataError("both the conversation and the column beside it have a system turn")
        messages = [{"role": "system", "content": str(system)}, *messages]
        turns = [{}, *turns]
    weights = [weight_of(index, turn) for index, turn in enumerate(turns)]
    untrained, chosen = (
        frozenset(i for i, weight in enumerate(weights) if weight is wanted) for wanted in (False, True)
    )
    return Conversation(messages, read_tools(tools), untrained, chosen)


def read_messages(value: Any) -> list[Message]:
    """Raises `DataError` naming the message."""
    return messages_of(turns_in(value))


def turns_in(value: Any) -> Any:
    """With whatever the row says of each, such as its weight; what is no list stays as it is."""
    found = parsed(value)
    return [to_message(turn) for turn in found] if isinstance(found, list) else found


def messages_of(turns: Any) -> list[Message]:
    """Raises `DataError` naming the message."""
    messages = read_plain(turns)
    for index, message in enumerate(messages):
        if message["role"] == "assistant" and not (message["content"].strip() or message.get("tool_calls")):
            raise DataError(f"message {index}: the answer is empty")
    return messages


def parsed(value: Any) -> Any:
    """A list or an object that stands in its column as JSON text."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def read_turns(value: Any, *, role: str, column: str) -> list[Message]:
    """A text is one turn of `role`; a message or a list of messages is itself."""
    if isinstance(value, str):
        if not value:
            raise DataError(f"column {column!r} is empty")
        return [{"role": role, "content": value}]
    return read_messages([value] if isinstance(value, dict) else value)


def read_prompt(row: dict[str, Any], names: Sequence[str], columns: ColumnsConfig) -> list[Message]:
    if len(names) == 1 and isinstance(row[names[0]], (list, dict)):
        turns = read_turns(row[names[0]], role="user", column=names[0])
    else:
        parts = [str(row[name]) for name in names if row[name] not in (None, "")]
        if not parts:
            raise DataError(f"column {names[0]!r} is empty")
        turns = [{"role": "user", "content": "\n\n".join(parts)}]
    if columns.system is not None and row[columns.system] not in (None, ""):
        turns = [{"role": "system", "content": str(row[columns.system])}, *turns]
    return turns


def read_tools(value: Any) -> list[dict[str, Any]]:
    """A list of OpenAI's tools or of bare functions, also as JSON text. Raises `DataError`."""
    found = parsed(value)
    if found in (None, "", []):
        return []
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise DataError("tools must be a list of functions, or JSON text of one")
    tools = [given(tool) if "function" in tool else {"type": "function", "function": given(tool)} for tool in found]
    for number, tool in enumerate(tools):
        function = tool.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"tool {number}: has no name")
    return tools


def given(value: Any) -> Any:
    """Without the nulls that Arrow fills in where only other rows have a key."""
    if isinstance(value, dict):
        return {key: given(item) for key, item in value.items() if item is not None}
    return [given(item) for item in value] if isinstance(value, list) else value


def to_message(message: Any) -> Any:
    """Templates take a key that is there for a given one, so nulls are left out. ShareGPT's `from` and `value` become
    `role` and `content`."""
    if not isinstance(message, dict):
        return message
    filled = given(message)
    if "content" in message and "role" in message:
        return {"content": None} | filled
    if "from" not in filled or "value" not in filled:
        return filled
    rest = {key: value for key, value in filled.items() if key not in ("from", "value")}
    role = SHAREGPT_ROLES.get(str(filled["from"]).lower(), filled["from"])
    if role == "function_call":
        return {**rest, "role": "assistant", "content": None, "tool_calls": calls_in(filled["value"])}
    return {**rest, "role": role, "content": filled["value"]}


def calls_in(value: Any) -> list[dict[str, Any]]:
    """ShareGPT's turn of a call: an object with name and arguments, or a list of them, as JSON text. Raises
    `DataError`."""
    found = parsed(value)
    calls = found if isinstance(found, list) else [found]
    if not all(isinstance(call, dict) and "name" in call for call in calls):
        raise DataError("a function_call must be JSON text of {name, arguments}")
    return [{"function": {"name": call["name"], "arguments": call.get("arguments")}} for call in calls]


def weight_of(index: int, turn: dict[str, Any]) -> bool | None:
    """Whether it says that it is trained; None: it says nothing. Raises `DataError` for a weight between."""
    for key in WEIGHTS:
        if (weight := turn.get(key)) is None:
            continue
        if isinstance(weight, bool | int | float) and weight in (0, 1):
            return bool(weight)
        raise DataError(f"message {index}: {key} {weight!r} must be 0 or 1: an answer is trained or it is not")
    return None
