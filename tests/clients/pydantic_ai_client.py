"""pydantic-ai against an endpoint: URL BASE ADAPTER; prints what it got as JSON. Runs in an environment of its own."""

import json
import sys

from kinds import Kind
from pydantic import BaseModel
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


class Order(BaseModel):
    kind: Kind


class Nothing(BaseModel):
    why: Kind


url, _, adapter = sys.argv[1:]
model = OpenAIChatModel(adapter, provider=OpenAIProvider(base_url=f"{url}/v1", api_key="none"))
settings = {"max_tokens": 120, "temperature": 0.0}
text = Agent(model, model_settings=settings | {"max_tokens": 8}).run_sync("where is my refund")
order = Agent(model, output_type=Order, model_settings=settings).run_sync("order 7 is paid")
either = Agent(model, output_type=[Order, Nothing], model_settings=settings).run_sync("order 7 is paid")
print(
    json.dumps(
        {"text": isinstance(text.output, str), "order": order.output.kind.value, "either": type(either.output).__name__}
    )
)
