"""openai-python against an endpoint: URL BASE ADAPTER; prints what it got as JSON."""

import json
import sys

import openai
from kinds import Item, Kind
from pydantic import BaseModel


class Order(BaseModel):
    """An order."""

    items: list[Item]
    kind: Kind


url, base, adapter = sys.argv[1:]
client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
ask = [{"role": "user", "content": "order 7 is paid"}]
common = {"model": adapter, "messages": ask, "temperature": 0}
whole = client.chat.completions.create(**common, max_tokens=16, logprobs=True)
again = client.chat.completions.with_raw_response.create(**common, max_tokens=4, store=False, metadata={"a": "b"})
tool = openai.pydantic_function_tool(Order)
called = client.chat.completions.create(**common, tools=[tool], tool_choice="required", max_tokens=400)
call = called.choices[0].message.tool_calls[0]
names, arguments = [], ""
for chunk in client.chat.completions.create(
    **common, tools=[tool], tool_choice="required", max_tokens=400, stream=True
):
    for piece in chunk.choices[0].delta.tool_calls or []:
        names += [piece.function.name] if piece.function.name else []
        arguments += piece.function.arguments or ""
parsed = client.chat.completions.parse(**common, response_format=Order, max_tokens=400)
try:
    client.chat.completions.create(model=adapter, messages=[{"role": "user", "content": "x " * 2000}])
    too_long = None
except openai.BadRequestError as error:
    too_long = error.code
try:
    client.models.retrieve("nobody")
    unknown = None
except openai.NotFoundError as error:
    unknown = error.code
print(
    json.dumps(
        {
            "model": whole.model,
            "retrieved": [client.models.retrieve(name).id for name in (base, adapter)],
            "logprobs": all(token.bytes is not None for token in whole.choices[0].logprobs.content),
            "same id": again.parse().id == f"chatcmpl-{again.headers['x-request-id']}",
            "call": call.function.name,
            "order": Order.model_validate_json(call.function.arguments).kind.value,
            "streamed": (names, arguments == call.function.arguments),
            "parsed": parsed.choices[0].message.parsed.kind.value,
            "too long": too_long,
            "unknown": unknown,
        }
    )
)
