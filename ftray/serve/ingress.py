"""The HTTP side: OpenAI's routes over an abstract backend, so that it runs without ray in a test."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from fastapi import FastAPI, HTTPException
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse

from ftray.config.serve import LimitsConfig
from ftray.errors import FtrayError, NotFoundError
from ftray.serve.accounts import Usage
from ftray.serve.body import BodyLimits
from ftray.serve.gate import Caller, Gate, Headers
from ftray.serve.models import MayUse, ModelNames, ServedModel, everything
from ftray.serve.replica import Event, GenerateJob
from ftray.serve.schemas import ApiRequest, ChatRequest, CompletionRequest, error_body, usage_body
from ftray.serve.shapes import ChatShape, CompletionShape, Shape, server_event

MAX_TRIES = 3
# How often a replica tells of an answer that nobody watches: enough to know what was computed if it is cut short.
UNSEEN_EVERY_S = 0.5


class Backend(Protocol):
    """The replicas, wherever they are. A replica that dies is an error event, not an exception."""

    def stream(self, job: GenerateJob) -> AsyncIterator[Event]: ...

    async def warm(self, adapter: str) -> int:
        """Loads it on every replica; returns how many there are."""
        ...

    async def in_use(self, adapter: str) -> int:
        """Requests that run with it now."""
        ...


def make_api(limits: LimitsConfig) -> FastAPI:
    """The application's shell; the routes are added once there is a backend."""
    api = FastAPI(title="ftray", docs_url="/docs")
    api.add_middleware(BodyLimits, max_bytes=limits.body_bytes, timeout_s=limits.body_timeout_s)

    @api.exception_handler(RequestValidationError)
    async def invalid(_: Any, error: RequestValidationError) -> JSONResponse:
        problem = error.errors()[0]
        parameter = ".".join(str(part) for part in problem["loc"] if part != "body")
        rule = "this endpoint has no such parameter" if problem["type"] == "extra_forbidden" else problem["msg"]
        return JSONResponse(error_body(f"{parameter}: {rule}", status=400, param=parameter), status_code=400)

    @api.exception_handler(HTTPException)
    async def refused(_: Any, error: HTTPException) -> JSONResponse:
        param = "model" if error.status_code == 404 else None
        busy = {"Retry-After": "1"} if error.status_code in (429, 503) else {}
        return JSONResponse(
            error_body(str(error.detail), status=error.status_code, param=param),
            status_code=error.status_code,
            headers=busy | dict(error.headers or {}),
        )

    return api


@dataclass
class Answer:
    """What one request has come to so far: what the client, the ledger and a canary's watch are told."""

    caller: Caller
    model: ServedModel
    began: float = field(default_factory=time.perf_counter)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    first_token_s: float | None = None
    is_whole: bool = False

    def start(self, event: Event) -> None:
        self.prompt_tokens = event["prompt_tokens"]
        self.cached_tokens = self.completion_tokens = 0

    def take(self, event: Event) -> None:
        """One or more tokens."""
        if self.first_token_s is None:
            self.first_token_s = time.perf_counter() - self.began
        self.completion_tokens += event["num_tokens"]
        if event["index"] == 0:  # the others find what the first computed
            self.cached_tokens = event["cached_tokens"]

    def usage(self) -> Usage:
        return Usage(
            request_id=self.caller.request_id,
            tenant=self.caller.tenant.name,
            model=self.model.id,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            completion_tokens=self.completion_tokens,
            outcome="whole" if self.is_whole else "cut",
            at=time.time(),
        )

    def head(self, shape: Shape) -> dict:
        return {
            "id": f"{shape.prefix}-{self.caller.request_id}",
            "created": int(time.time()),
            "model": self.model.id,
        }

    @property
    def usage_body(self) -> dict:
        return usage_body(self.prompt_tokens, self.completion_tokens, self.cached_tokens)


class Ingress:
    def __init__(self, names: ModelNames, backend: Backend, gate: Gate, *, timeout_s: float | None = None):
        self.names = names
        self.backend = backend
        self.gate = gate
        self.timeout_s = timeout_s
        self._closing: set[asyncio.Task] = set()  # of answers whose client has gone

    async def chat(self, request: ChatRequest, headers: Headers) -> Any:
        return await self._answer(request, request.messages, ChatShape, headers)

    async def completion(self, request: CompletionRequest, headers: Headers) -> Any:
        return await self._answer(request, request.prompt, CompletionShape, headers)

    async def models(self, headers: Headers) -> dict:
        tenant = await self.gate.tenant(headers)
        return await asyncio.to_thread(self.names.listing, tenant.may_use)

    async def warm(self, adapter: str, headers: Headers) -> dict:
        await self.gate.require_admin(headers)
        model = await self._resolve(adapter)
        if model.adapter is None:
            raise HTTPException(400, f"{adapter}: the base is always loaded")
        try:
            return {"model": model.adapter, "replicas": await self.backend.warm(model.adapter)}
        except FtrayError as error:
            raise HTTPException(400, str(error)) from None

    async def in_use(self, adapter: str, headers: Headers) -> dict:
        await self.gate.require_admin(headers)
        return {"model": adapter, "requests": await self.backend.in_use(adapter)}

    async def _resolve(self, name: str, *, key: str | None = None, may_use: MayUse = everything) -> ServedModel:
        try:
            return await asyncio.to_thread(self.names.resolve, name, key=key, may_use=may_use)
        except NotFoundError as error:
            raise HTTPException(404, str(error)) from None
        except FtrayError as error:  # the registry's store does not answer, say
            raise HTTPException(503, str(error)) from None

    async def _answer(self, request: ApiRequest, prompt: Any, shape: Shape, headers: Headers) -> Any:
        deadline = self._deadline(headers)
        caller = await self.gate.admit(headers, user=request.user)
        tenant = caller.tenant
        model = await self._resolve(request.model, key=caller.key, may_use=tenant.may_use)
        job = GenerateJob(
            prompt,
            is_chat=shape is ChatShape,
            sampling=request.sampling(),
            adapter=model.adapter,
            # Who is not known may share by the name they give; a tenant gets no larger share by giving many.
            tenant=tenant.name or request.user or "",
            priority=tenant.priority,
            every_s=0.0 if request.stream else UNSEEN_EVERY_S,
        )
        answer = Answer(caller, model)
        if request.stream:
            events, first = await self._begin(answer, job, deadline)
            raise_if_error(first)
            answer.start(first)
            chunks = self._chunks(events, answer, shape, deadline, include_usage=request.include_usage)
            return StreamingResponse(chunks, media_type="text/event-stream")
        try:
            choices = await self._whole(answer, job, deadline)
        finally:
            await self._settle(answer)
        return answer.head(shape) | {
            "object": shape.whole,
            "choices": [shape.choice(index, one) for index, one in enumerate(choices)],
            "usage": answer.usage_body,
        }

    async def _begin(
        self, answer: Answer, job: GenerateJob, deadline: float | None
    ) -> tuple[AsyncIterator[Event], Event]:
        """The events and the first of them. What a canary cannot answer the stable version does."""
        while True:
            events = self.backend.stream(replace(job, adapter=answer.model.adapter))
            first = await next_event(events, deadline)
            tried = answer.model
            if "error" not in first or not tried.is_canary or not (first["status"] >= 500 or "adapter_failed" in first):
                return events, first
            await asyncio.to_thread(self.names.note, tried, failed=True, first_token_s=None)
            assert tried.stable is not None
            answer.model = replace(tried, id=tried.stable, adapter=tried.stable, is_canary=False)

    async def _whole(self, answer: Answer, job: GenerateJob, deadline: float | None) -> list[Event]:
        """The answers at once. A replica that dies on the way is tried again on another: nothing has been shown yet."""
        for tries_left in reversed(range(MAX_TRIES)):
            events, event = await self._begin(answer, job, deadline)
            raise_if_error(event)
            answer.start(event)
            choices: list[Event] = [{"text": "", "finish_reason": None, "logprobs": []} for _ in range(job.sampling.n)]
            while not all(choice["finish_reason"] for choice in choices):
                event = await next_event(events, deadline)
                if "error" in event:
                    break
                answer.take(event)
                choice = choices[event["index"]]
                choice["text"] += event["text"]
                choice["logprobs"] += event["logprobs"]
                choice["finish_reason"] = event["finish_reason"]
            else:
                answer.is_whole = True
                return choices
            if "replica_died" not in event or not tries_left:
                raise_if_error(event)
        raise AssertionError("the last try returns or raises")

    async def _chunks(
        self,
        events: AsyncIterator[Event],
        answer: Answer,
        shape: Shape,
        deadline: float | None,
        *,
        include_usage: bool,
    ) -> AsyncIterator[str]:
        head = answer.head(shape) | {"object": shape.chunk}
        no_usage = {"usage": None} if include_usage else {}
        opened: set[int] = set()
        try:
            async for event in until(events, deadline):
                if "error" in event:
                    yield server_event(error_body(event["error"], status=event["status"]))
                    return
                answer.take(event)
                index = event["index"]
                if event["text"] or event["finish_reason"] or event["logprobs"] or index not in opened:
                    delta = shape.delta(index, event, first=index not in opened)
                    yield server_event(head | {"choices": [delta]} | no_usage)
                    opened.add(index)
            answer.is_whole = True
        finally:
            await self._settle(answer)  # before the client is told that it is whole
        if include_usage:
            yield server_event(head | {"choices": [], "usage": answer.usage_body})
        yield "data: [DONE]\n\n"

    async def _settle(self, answer: Answer) -> None:
        """Tells the ledger and the canary's watch, also when the client has gone."""
        if answer.model.canary is not None:
            failed = answer.prompt_tokens > 0 and not answer.is_whole
            await asyncio.to_thread(self.names.note, answer.model, failed=failed, first_token_s=answer.first_token_s)
        if answer.prompt_tokens:
            task = asyncio.create_task(self.gate.record(answer.usage()))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
            await asyncio.shield(task)

    def _deadline(self, headers: Headers) -> float | None:
        """On the event loop's clock: the caller's own, within the endpoint's."""
        asked = headers.get("x-request-timeout")
        try:
            seconds = [float(asked)] if asked else []
        except ValueError:
            raise HTTPException(400, f"X-Request-Timeout: {asked!r} is no number of seconds") from None
        seconds += [self.timeout_s] if self.timeout_s is not None else []
        return asyncio.get_running_loop().time() + min(seconds) if seconds else None


async def next_event(events: AsyncIterator[Event], deadline: float | None) -> Event:
    try:
        async with asyncio.timeout_at(deadline):
            return await anext(events)
    except TimeoutError:
        return {"error": "the request's deadline has passed", "status": 504}


async def until(events: AsyncIterator[Event], deadline: float | None) -> AsyncIterator[Event]:
    with contextlib.suppress(StopAsyncIteration):
        while True:
            yield await next_event(events, deadline)


def raise_if_error(event: Event) -> None:
    if "error" in event:
        raise HTTPException(event["status"], event["error"])
