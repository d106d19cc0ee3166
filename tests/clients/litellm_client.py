"""LiteLLM's SDK, and its proxy in front of an endpoint: URL ADAPTER PROXY PROXY_KEY; prints what it got as
JSON. Runs in an environment of its own."""

import json
import sys

import httpx
import litellm

url, adapter, proxy, key = sys.argv[1:]
common = {"api_base": f"{url}/v1", "api_key": "none", "max_retries": 0}
ask = [{"role": "user", "content": "where is my refund"}]
found: dict = {}
for kind in ("openai", "hosted_vllm"):
    answer = litellm.completion(model=f"{kind}/{adapter}", messages=ask, max_tokens=8, temperature=0, **common)
    stream = litellm.completion(
        model=f"{kind}/{adapter}", messages=ask, max_tokens=8, temperature=0, stream=True, **common
    )
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    found[kind] = streamed == answer.choices[0].message.content
try:
    long = [{"role": "user", "content": "x " * 2000}]
    litellm.completion(model=f"openai/{adapter}", messages=long, max_tokens=8, **common)
except litellm.ContextWindowExceededError:
    found["too long"] = "ContextWindowExceededError"
# A path that the endpoint lacks is one user's mistake; the proxy must not take the model for gone.
body = {"model": adapter, "messages": ask, "max_tokens": 8}
headers = {"Authorization": f"Bearer {key}"}
statuses = []
with httpx.Client(base_url=proxy, timeout=60) as http:
    for _ in range(3):
        http.post("/v1/responses", json={"model": adapter, "input": "hi"}, headers=headers)
        statuses.append(http.post("/v1/chat/completions", json=body, headers=headers).status_code)
found["proxy"] = statuses
print(json.dumps(found))
