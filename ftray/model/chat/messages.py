"""Chat messages as OpenAI's API has them, to what the renderer takes: text content, calls with their arguments,
thoughts. The same in training and serving.

Histories hold what models wrote, so a call whose arguments are no JSON is passed on as it was written.
"""

import json
from collections.abc import Sequence
from typing import Any

from ftray.errors import DataError

Message = dict[str, Any]
ROLES = ("system", "user", "assistant", "tool")
OTHER_ROLES = {"developer": "system", "function": "tool"}  # a newer and an older word
THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")  # what a message's thought is called
# Of a part, by its type: where its text is.
TEXTS = {
    "text": "text",
    "refusal": "refusal",
    "input_text": "text",
    "output_text": "text",
}


def read_messages(messages: Any) -> list[Message]:
    """Raises `DataError` naming the message."""
    if not isinstance(messages, list) or not messages:
        raise DataError("messages must be a non-empty list of {role, content}")
    return check_messages([plain_message(index, message) for index, message in enumerate(messages)])


def check_messages(messages: list[Message]) -> list[Message]:
    """The messages as they are; raises `DataError` naming what is wrong with them."""
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise DataError(f"message {index} must have `role` and `content`")
        if message["role"] not in ROLES:
            raise DataError(f"message {index}: role {message['role']!r} must be one of {', '.join(ROLES)}")
        if not isinstance(message["content"], str):
            raise DataError(f"message {index}: content must be text")
    return messages


def plain_message(index: int, message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    for key in ("role", "name", "tool_call_id", "refusal", *THOUGHT_KEYS):
        if not isinstance(message.get(key), str | None):
            raise DataError(f"message {index}: {key} must be a text")
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise DataError(f"message {index}: tool_calls must be a list")
    if message.get("function_call"):  # before there were tools
        calls = [*calls, {"function": message["function_call"]}]
    content = message.get("content")
    if isinstance(content, list):
        content = joined_text(index, content)
    role = OTHER_ROLES.get(message.get("role") or "", message.get("role"))
    if content is None and role == "assistant":  # calls alone, a refusal, or an answer that had no token
        content = message.get("refusal") or ""
    plain = {key: value for key, value in message.items() if key in ("name", "tool_call_id") and value is not None}
    if role is not None:
        plain["role"] = role
    if content is not None:
        plain["content"] = content
    if (thought := next((message[key] for key in THOUGHT_KEYS if message.get(key) is not None), None)) is not None:
        plain["reasoning_content"] = thought
    return plain | ({"tool_calls": [call(index, entry) for entry in calls]} if calls else {})


def joined_text(index: int, parts: Sequence[Any]) -> str:
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        text = part.get(TEXTS.get(str(kind), "")) if isinstance(part, dict) else None
        if not isinstance(text, str):
            raise DataError(f"message {index}: content of type {repr(kind)[:40]} is not read here; only text")
        texts.append(text)
    return "".join(texts)


def call(index: int, entry: Any) -> dict[str, Any]:
    function = entry.get("function") if isinstance(entry, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"message {index}: a tool call needs function.name and function.arguments (JSON as text)")
    named = {"name": function["name"], "arguments": arguments(function.get("arguments"))}
    return {"id": entry.get("id"), "type": "function", "function": named}


def arguments(given: Any) -> Any:
    """Templates want an object; the API has it as text. What is none, or was cut, stays the text that it is."""
    if given is None or given == "":
        return {}
    try:
        read = json.loads(given) if isinstance(given, str) else given
    except ValueError:
        return given
    return read if isinstance(read, dict) else given if isinstance(given, str) else json.dumps(given)
