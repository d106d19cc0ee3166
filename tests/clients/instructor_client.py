"""instructor against an endpoint: URL BASE ADAPTER; prints what it got as JSON. Runs in an environment of its own."""

import json
import sys

import instructor
import openai
from kinds import Item, Kind
from pydantic import BaseModel


class Order(BaseModel):
    item: Item
    kind: Kind


url, _, adapter = sys.argv[1:]
plain = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
found = {}
for mode in (instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA):
    client = instructor.from_openai(plain, mode=mode)
    messages = [{"role": "user", "content": "order 7 is paid"}]
    order = client.chat.completions.create(
        model=adapter, messages=messages, response_model=Order, max_tokens=400, temperature=0, max_retries=1
    )
    found[mode.name] = order.item.kind.value
print(json.dumps(found))
