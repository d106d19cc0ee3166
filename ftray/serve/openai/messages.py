"""Chat messages as OpenAI's API has them, to what the renderer takes: text content, calls with their arguments."""

import json
from collections.abc import Sequence
from typing import Any

from ftray.errors import DataError

Message = dict[str, Any]


def renderable(messages: Sequence[Message]) -> list[Message]:
    """Raises `DataError` naming the message."""
    return [renderable_message(index, message) for index, message in enumerate(messages)]


def renderable_message(index: int, message: Message) -> Message:
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise DataError(f"message {index}: tool_calls must be a list")
    content = message.get("content")
    if isinstance(content, list):
        content = joined_text(index, content)
    if content is None and calls:
        content = ""
    role = "system" if message.get("role") == "developer" else message.get("role")  # OpenAI's newer word for it
    plain = {key: value for key, value in message.items() if key in ("name", "tool_call_id") and value is not None}
    if role is not None:
        plain["role"] = role
    if content is not None:
        plain["content"] = content
    return plain | ({"tool_calls": [call(index, entry) for entry in calls]} if calls else {})


def joined_text(index: int, parts: Sequence[Any]) -> str:
    texts = []
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = repr(part.get("type"))[:40] if isinstance(part, dict) else type(part).__name__
            raise DataError(f"message {index}: content of type {kind} is not served here; only text")
        texts.append(part["text"])
    return "".join(texts)


def call(index: int, entry: Any) -> dict[str, Any]:
    """Templates want the arguments as an object; the API has them as text."""
    try:
        function = entry["function"]
        arguments = json.loads(function["arguments"])
        name = function["name"]
    except (KeyError, TypeError, ValueError):
        raise DataError(
            f"message {index}: a tool call needs function.name and function.arguments (JSON as text)"
        ) from None
    return {"id": entry.get("id"), "type": "function", "function": {"name": name, "arguments": arguments}}
