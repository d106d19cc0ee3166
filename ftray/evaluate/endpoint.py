"""Through a running endpoint, as any client would: the same questions over the OpenAI-compatible HTTP API."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import httpx

from ftray.errors import FtrayError, UserError
from ftray.evaluate.task import Evaluation, judged
from ftray.tasks import EXACT_MATCH, Question, Task

CONCURRENCY = 16
TIMEOUT_S = 300.0


def evaluate_endpoint(
    url: str, questions: Sequence[Question], *, model: str, max_tokens: int, task: Task = EXACT_MATCH
) -> Evaluation:
    with httpx.Client(base_url=url, timeout=TIMEOUT_S) as client, ThreadPoolExecutor(CONCURRENCY) as pool:
        texts = list(pool.map(lambda q: ask(client, q, model=model, max_tokens=max_tokens), questions))
    answers = [judged(task, question, text) for question, text in zip(questions, texts, strict=True)]
    return Evaluation(model, answers, loss=None, task=task)


def ask(client: httpx.Client, question: Question, *, model: str, max_tokens: int) -> str:
    body = {"model": model, "messages": question.messages, "temperature": 0, "max_tokens": max_tokens}
    if question.tools:
        body["tools"] = question.tools
    try:
        response = client.post("/v1/chat/completions", json=body)
    except httpx.HTTPError as error:
        raise FtrayError(
            f"{client.base_url}: the endpoint does not answer ({error}); is `ftray serve` running?"
        ) from None
    if response.status_code != 200:
        is_json = response.headers.get("content-type", "").startswith("application/json")
        message = response.json().get("error", {}).get("message") if is_json else response.text[:200]
        raise (UserError if response.status_code < 500 else FtrayError)(f"{client.base_url}: {message}")
    return response.json()["choices"][0]["message"]["content"]
