"""LlamaIndex against an endpoint: URL BASE ADAPTER; prints what it got as JSON. Runs in an environment of its own."""

import json
import sys
from typing import Literal

from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel


class Order(BaseModel):
    kind: Literal["refund", "delivery"]


def weather(city: Literal["Oslo", "Rome"]) -> str:
    """The weather of a city."""
    return f"rain in {city}"


url, _, adapter = sys.argv[1:]
model = OpenAILike(
    model=adapter,
    api_base=f"{url}/v1",
    api_key="none",
    is_chat_model=True,
    is_function_calling_model=True,
    context_window=1024,
    max_tokens=300,
    temperature=0,
    max_retries=0,
)
said = model.chat([ChatMessage(role="user", content="where is my refund")], max_tokens=8)
tool = FunctionTool.from_defaults(weather)
called = model.chat_with_tools([tool], user_msg="weather in Oslo?", tool_required=True)
auto = model.chat_with_tools([tool], user_msg="weather in Oslo?", max_tokens=8)
(call,) = model.get_tool_calls_from_response(called)
order = model.as_structured_llm(Order).complete("order 7 is paid").raw
print(
    json.dumps(
        {
            "text": bool(said.message.content is not None),
            "call": call.tool_name,
            "arguments": sorted(call.tool_kwargs),
            "auto": auto.message.role.value,
            "order": order.kind,
        }
    )
)
