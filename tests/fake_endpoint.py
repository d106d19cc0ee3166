"""The HTTP side over replicas that are not there."""

import asyncio
from collections.abc import AsyncIterator

import fastapi
from fastapi.testclient import TestClient

from ftray.config.serve import LimitsConfig
from ftray.serve.ingress import Ingress, make_api
from ftray.serve.replica import GenerateJob
from ftray.serve.schemas import ChatRequest, CompletionRequest


def answer(text: str, reason: str | None) -> dict:
    told = [
        {"token": "I", "logprob": -0.5, "top": [{"token": "I", "logprob": -0.5}, {"token": "\ufffd", "logprob": -1.0}]}
    ]
    return {"text": text, "finish_reason": reason, "logprobs": told}


DIED = {"error": "the replica died", "status": 502, "replica_died": True}


class EchoBackend:
    """Answers with the model it was asked for; remembers the jobs."""

    def __init__(self):
        self.jobs: list[GenerateJob] = []
        self.error: dict | None = None
        self.broken: set[str | None] = set()  # adapters that cannot be loaded
        self.deaths = 0  # of replicas, each after its first token
        self.pause_s = 0.0  # between two tokens

    async def stream(self, job: GenerateJob) -> AsyncIterator[dict]:
        self.jobs.append(job)
        if self.error:
            yield self.error
            return
        if job.adapter in self.broken:
            yield {"error": "truncated file", "status": 400, "adapter_failed": True}
            return
        yield {"prompt_tokens": 3}
        for index in range(job.sampling.n):
            head = {"index": index, "cached_tokens": 0, "num_tokens": 1}
            yield head | answer("I am ", None)
            await asyncio.sleep(self.pause_s)
            if self.deaths:
                self.deaths -= 1
                yield DIED
                return
            yield head | answer(str(job.adapter), "stop")


def make_client(ingress: Ingress, **limits) -> TestClient:
    api = make_api(LimitsConfig(**limits))

    async def chat(request: ChatRequest, http: fastapi.Request):
        return await ingress.chat(request, http.headers)

    async def completion(request: CompletionRequest, http: fastapi.Request):
        return await ingress.completion(request, http.headers)

    async def models(http: fastapi.Request):
        return await ingress.models(http.headers)

    api.post("/v1/chat/completions")(chat)
    api.post("/v1/completions")(completion)
    api.get("/v1/models")(models)
    return TestClient(api)


def ask(client, model, **more):
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}], **more}
    return client.post("/v1/chat/completions", json=body)
