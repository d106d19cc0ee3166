"""The HTTP side over replicas that are not there."""

import asyncio
from collections.abc import AsyncIterator

from fastapi.testclient import TestClient

from ftray.config import ServeConfig
from ftray.serve.http.api import make_api
from ftray.serve.http.embeddings import Embeddings
from ftray.serve.http.ingress import Ingress
from ftray.serve.http.playground import Overview, RecentTraffic
from ftray.serve.http.routes import ROUTES
from ftray.serve.http.services import Services
from ftray.serve.protocol import Event, Failed, GenerateJob, Started, TokenLogprob, Tokens
from ftray.serve.tenants.rate_limits import RateLimiter

LOGPROB = TokenLogprob("I", -0.5, (TokenLogprob("I", -0.5), TokenLogprob("\ufffd", -1.0, raw=b"\xe2\x82")))
DIED = Failed("the replica died", 502, replica_died=True)


class EchoBackend:
    """Answers with the model it was asked for; remembers the jobs."""

    def __init__(self):
        self.jobs: list[GenerateJob] = []
        self.error: Failed | None = None
        self.broken: set[str | None] = set()  # adapters that cannot be loaded
        self.deaths = 0  # of replicas, each after its first token
        self.pause_s = 0.0  # between two tokens
        self.num_open = 0  # streams
        self.text = "I am "
        self.end: str | None = None  # after it; None: who answers
        self.reason = "stop"

    async def stream(self, job: GenerateJob) -> AsyncIterator[Event]:
        self.num_open += 1
        try:
            async for event in self._stream(job):
                yield event
        finally:
            self.num_open -= 1

    async def look(self) -> list[dict]:
        adapters = [{"name": name, "tier": "device"} for name in ("support@2", "legal@1")]
        bytes_of = {"adapter_bytes": 5 * 2**20, "adapter_budget": 2**30}
        cache = {"kv_tokens_used": 16, "kv_tokens_total": 1024}
        return [{"id": "r1", "running": 0, "waiting": 0, "adapters": adapters, **bytes_of, **cache}]

    async def _stream(self, job: GenerateJob) -> AsyncIterator[Event]:
        self.jobs.append(job)
        if self.error:
            yield self.error
            return
        if job.adapter in self.broken:
            yield Failed("truncated file", 400, adapter_failed=True)
            return
        yield Started(3 * len(job.prompts), adapter_s=0.25, queue_s=0.5)
        for index in range(job.num_answers):
            first = index % job.sampling.n == 0
            yield Tokens(index, first, 1, self.text, logprobs=(LOGPROB,))
            await asyncio.sleep(self.pause_s)
            if self.deaths:
                self.deaths -= 1
                yield DIED
                return
            end = str(job.adapter) if self.end is None else self.end
            yield Tokens(index, first, 1, end, finish_reason=self.reason, logprobs=(LOGPROB,))


class LocalLedger:
    """The rate limiter in this process."""

    def __init__(self, keeper: RateLimiter):
        self.keeper = keeper

    async def admit(self, key):
        return self.keeper.admit(key)

    async def identify(self, key):
        return self.keeper.identify(key)

    async def record(self, usage):
        self.keeper.record(usage).result(timeout=10)


def make_client(ingress: Ingress, *, watchers=(), routes=ROUTES, settings=None, **limits) -> TestClient:
    """`settings`: of the endpoint's config."""
    traffic = RecentTraffic()
    texts = Embeddings(ingress.names, ingress.backend, ingress.auth)
    overview = Overview(ingress.names, ingress.backend, ingress.auth, traffic)
    services = Services(ingress, texts, overview)
    given = {"kind": "serve", "base_model": "base-model", "limits": limits, **(settings or {})}
    api = make_api(services, ServeConfig.model_validate(given), watchers=[traffic, *watchers], routes=routes)
    return TestClient(api, base_url="http://127.0.0.1:8000")


def ask(client, model, *, headers=None, **more):
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}], **more}
    return client.post("/v1/chat/completions", json=body, headers=headers)
