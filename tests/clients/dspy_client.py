"""DSPy against an endpoint: URL BASE ADAPTER; prints what it got as JSON. Runs in an environment of its own."""

import json
import sys

import dspy

url, _, adapter = sys.argv[1:]
lm = dspy.LM(f"openai/{adapter}", api_base=f"{url}/v1", api_key="none", temperature=0, max_tokens=300, cache=False)
dspy.configure(lm=lm)
text = lm("where is my refund", max_tokens=8)
schema = {"type": "object", "properties": {"kind": {"enum": ["refund", "delivery"]}}, "required": ["kind"]}
wrapped = {"type": "json_schema", "json_schema": {"name": "order", "schema": schema, "strict": True}}
order = json.loads(lm("order 7 is paid", response_format=wrapped)[0])
print(json.dumps({"text": isinstance(text[0], str), "kind": order["kind"]}))
