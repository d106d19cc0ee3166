"""Tools told to a model whose chat template has no place for them: in the words of Hermes' function calling
(https://github.com/NousResearch/Hermes-Function-Calling), which Qwen's templates use too."""

import json
from collections.abc import Sequence
from typing import Any

Message = dict[str, Any]

OPENING, CLOSING = "<tool_call>", "</tool_call>"

INTRODUCTION = """You may call functions to answer the user. Their signatures are within <tools></tools>:
<tools>
{tools}
</tools>
For each call return a JSON object with the function's name and arguments within <tool_call></tool_call>:
<tool_call>
{{"name": <name>, "arguments": <arguments>}}
</tool_call>"""


def tools_in_text(
    messages: Sequence[Message], tools: Sequence[dict[str, Any]], *, takes_system: bool = True
) -> list[Message]:
    """The same conversation in plain messages: tools in the system message, or where the template takes none before
    the first user turn; calls and results as marked text."""
    signatures = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    plain = [plain_message(message) for message in messages]
    if not tools:
        return plain
    introduction = INTRODUCTION.format(tools=signatures)
    if plain and plain[0]["role"] == "system":
        return [{"role": "system", "content": f"{plain[0]['content']}\n\n{introduction}"}, *plain[1:]]
    if not takes_system and plain and plain[0]["role"] == "user":
        return [{"role": "user", "content": f"{introduction}\n\n{plain[0]['content']}"}, *plain[1:]]
    return [{"role": "system", "content": introduction}, *plain]


def plain_message(message: Message) -> Message:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    calls = [
        f"{OPENING}\n{json.dumps(call['function'], ensure_ascii=False)}\n{CLOSING}"
        for call in message.get("tool_calls", [])
    ]
    rest = {key: value for key, value in message.items() if key not in ("content", "tool_calls")}
    return {**rest, "content": "\n".join([*filter(None, [message["content"]]), *calls])}
