"""LangChain against an endpoint: URL BASE ADAPTER; prints what it got as JSON. Runs in an environment of its own."""

import json
import sys
from typing import Literal

from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel


class Order(BaseModel):
    about: Literal["refund", "delivery"]
    paid: bool


def weather(city: Literal["Oslo", "Rome"]) -> str:
    """The weather of a city."""
    return f"rain in {city}"


url, _, adapter = sys.argv[1:]
model = ChatOpenAI(base_url=f"{url}/v1", api_key="none", model=adapter, temperature=0, max_tokens=24, max_retries=0)
whole = model.invoke("where is my refund")
pieces = list(model.stream("where is my refund", stream_usage=True))
batch = model.batch(["where is my refund", "hello"])
longer = model.model_copy(update={"max_tokens": 200})
order = longer.with_structured_output(Order, method="json_schema").invoke("order 7 is paid")
called = longer.bind_tools([weather], tool_choice="required").invoke("weather in Oslo?")
call = called.tool_calls[0]
answered = model.invoke(
    [HumanMessage("weather in Oslo?"), called, ToolMessage("rain", tool_call_id=call["id"])],
)
by_function = longer.with_structured_output(Order, method="function_calling").invoke("order 7 is paid")


@tool
def plain(city: str) -> str:
    """The weather of a city."""
    return f"rain in {city}"


plainly = longer.bind_tools([plain], tool_choice="any", parallel_tool_calls=False).invoke("weather in Oslo?")
broken = AIMessage("", invalid_tool_calls=[{"name": "plain", "args": '{"city": ', "id": "c1", "error": "cut"}])
after = model.invoke([HumanMessage("weather?"), broken, ToolMessage("say it again", tool_call_id="c1")])
print(
    json.dumps(
        {
            "text": whole.content,
            "model": whole.response_metadata["model_name"],
            "usage": whole.usage_metadata,
            "streamed": "".join(piece.content for piece in pieces),
            "streamed_usage": next(piece.usage_metadata for piece in reversed(pieces) if piece.usage_metadata),
            "batch": [answer.content for answer in batch],
            "order": order.model_dump(),
            "call": call["name"],
            "arguments": sorted(call["args"]),
            "by_function": by_function.about,
            "plain": sorted((plainly.tool_calls or plainly.invalid_tool_calls)[0]["args"])
            if plainly.tool_calls
            else ["city"] * ('"city"' in plainly.invalid_tool_calls[0]["args"]),
            "after a broken call": after.response_metadata["finish_reason"],
            "answered": answered.response_metadata["finish_reason"],
        }
    )
)
