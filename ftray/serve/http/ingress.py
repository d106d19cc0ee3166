"""The HTTP side: OpenAI's routes over an abstract backend, so that it runs without ray in a test."""

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from dataclasses import replace
from typing import Any, Protocol

from fastapi import HTTPException
from fastapi.responses import StreamingResponse

from ftray.errors import FtrayError, NotFoundError
from ftray.serve.http.answer import Answer
from ftray.serve.http.context import RequestContext, detached
from ftray.serve.http.refusals import Refused, refusal_of
from ftray.serve.openai.responses import ChatResponses, CompletionResponses, Responses, server_event
from ftray.serve.openai.schemas import ApiRequest, ChatRequest, CompletionRequest, error_body
from ftray.serve.openai.tools import as_given
from ftray.serve.protocol import Event, Failed, GenerateJob, Started, Tokens
from ftray.serve.routing.model_names import MayUse, ModelNames, ServedModel, everything
from ftray.serve.tenants.auth import Authenticator, Headers

MAX_TRIES = 3
DEADLINE_PASSED = "the request's deadline has passed"
# How often a replica tells of an answer that nobody watches: enough to know what was computed if it is cut short.
UNSEEN_EVERY_S = 0.5
# A proxy in between neither keeps a stream nor holds its tokens back (the latter is nginx's).
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class Backend(Protocol):
    """The replicas, wherever they are. A replica that dies is a `Failed`, not an exception."""

    def stream(self, job: GenerateJob) -> AsyncGenerator[Event]: ...

    async def warm(self, adapter: str) -> int:
        """Loads it on every replica; returns how many there are."""
        ...

    async def in_use(self, adapter: str) -> int:
        """Requests that run with it now."""
        ...


class Ingress:
    def __init__(self, names: ModelNames, backend: Backend, auth: Authenticator, *, timeout_s: float | None = None):
        self.names = names
        self.backend = backend
        self.auth = auth
        self.timeout_s = timeout_s

    async def chat(self, request: ChatRequest, context: RequestContext) -> Any:
        tools = request.usable_tools
        responses = ChatResponses(
            [tool.function.name for tool in tools],
            is_forced=request.must_call is not None,
            max_calls=1 if request.parallel_tool_calls is False else None,
        )
        return await self._answer(request, [request.messages], responses, context, tools=as_given(tools))

    async def completion(self, request: CompletionRequest, context: RequestContext) -> Any:
        return await self._answer(request, request.prompts, CompletionResponses(), context)

    async def models(self, context: RequestContext) -> dict:
        tenant = await self.auth.tenant(context)
        return await asyncio.to_thread(self.names.listing, tenant.may_use)

    async def model(self, name: str, context: RequestContext) -> dict:
        tenant = await self.auth.tenant(context)
        await resolved(self.names, name, may_use=tenant.may_use)
        return self.names.entry(name)

    async def warm(self, adapter: str, context: RequestContext) -> dict:
        await self.auth.require_admin(context)
        model = await resolved(self.names, adapter)
        if model.adapter is None:
            raise HTTPException(400, f"{adapter}: the base is always loaded")
        try:
            return {"model": model.adapter, "replicas": await self.backend.warm(model.adapter)}
        except FtrayError as error:
            raise HTTPException(400, str(error)) from None

    async def in_use(self, adapter: str, context: RequestContext) -> dict:
        await self.auth.require_admin(context)
        return {"model": adapter, "requests": await self.backend.in_use(adapter)}

    async def _answer(
        self,
        request: ApiRequest,
        prompts: list[Any],
        responses: Responses,
        context: RequestContext,
        *,
        tools: tuple[dict[str, Any], ...] = (),
    ) -> Any:
        context.asked_model, context.is_stream = request.model, bool(request.stream)
        deadline = deadline_of(context.headers, self.timeout_s)
        caller = await self.auth.admit(context)
        tenant = caller.tenant
        model = await resolved(self.names, request.model, session=caller.session, may_use=tenant.may_use)
        job = GenerateJob(
            prompts,
            is_chat=isinstance(responses, ChatResponses),
            sampling=request.sampling(),
            adapter=model.adapter,
            cache_salt=request.cache_salt or "",
            tenant=tenant.name,
            user=request.user or "",
            priority=tenant.priority,
            tools=tools,
            echo=request.wants_echo,
            is_prompt_only=not request.wants_answer,
            every_s=0.0 if request.stream else UNSEEN_EVERY_S,
        )
        answer = context.answer = Answer(caller, model, context.request_id, context.began)
        context.on_end = lambda: self._settle(answer)
        if request.stream:
            events, first = await self._begin(answer, job, deadline)
            context.on_end = lambda: self._end_stream(events, answer)
            answer.start(self._started(first, answer))
            chunks = self._chunks(events, answer, responses, deadline, include_usage=request.include_usage)
            return StreamingResponse(chunks, media_type="text/event-stream", headers=STREAM_HEADERS)
        choices = await self._whole(answer, job, deadline)
        await self._settle(answer)
        return head(answer, responses) | {
            "object": responses.whole,
            "choices": [responses.choice(one) for one in choices],
            "usage": answer.usage_body,
        }

    async def _begin(
        self, answer: Answer, job: GenerateJob, deadline: float | None
    ) -> tuple[AsyncGenerator[Event], Event]:
        """The events and the first of them. What a canary cannot answer the stable version does."""
        while True:
            events = self.backend.stream(replace(job, adapter=answer.model.adapter))
            first = await next_event(events, deadline)
            tried = answer.model
            if not (tried.is_canary and isinstance(first, Failed) and first.is_fault):
                return events, first
            await asyncio.to_thread(self.names.note, tried, failed=True, first_token_s=None)
            answer.model = tried.fallback

    async def _whole(self, answer: Answer, job: GenerateJob, deadline: float | None) -> list[Tokens]:
        """The answers at once. A replica that dies on the way is tried again on another: nothing has been shown yet."""
        for tries_left in reversed(range(MAX_TRIES)):
            events, event = await self._begin(answer, job, deadline)
            async with contextlib.aclosing(events):
                answer.start(self._started(event, answer))
                choices: dict[int, Tokens] = {}
                while isinstance(event := await next_event(events, deadline), Tokens):
                    answer.take(event)
                    before = choices.get(event.index)
                    choices[event.index] = before.followed_by(event) if before is not None else event
                    ended = sum(choice.finish_reason is not None for choice in choices.values())
                    if ended == job.num_answers:
                        answer.is_whole = True
                        return [choices[index] for index in range(job.num_answers)]
            if tries_left and isinstance(event, Failed) and event.replica_died:
                continue
            self._started(event, answer)
        raise AssertionError("the last try returns or raises")

    async def _chunks(
        self,
        events: AsyncIterator[Event],
        answer: Answer,
        responses: Responses,
        deadline: float | None,
        *,
        include_usage: bool,
    ) -> AsyncIterator[str]:
        common = head(answer, responses) | {"object": responses.chunk}
        no_usage = {"usage": None} if include_usage else {}
        opened: set[int] = set()
        async for event in until(events, deadline):
            if isinstance(event, Failed):
                answer.fail(event)
                yield server_event(error_body(event.message, event.status, param=event.param, code=event.code))
                return
            assert isinstance(event, Tokens)
            answer.take(event)
            delta = responses.delta(event, first=event.index not in opened)
            if delta is not None:
                yield server_event(common | {"choices": [delta]} | no_usage)
                opened.add(event.index)
        answer.is_whole = True
        await self._settle(answer)  # before the client is told that it is whole
        if include_usage:
            yield server_event(common | {"choices": [], "usage": answer.usage_body})
        yield "data: [DONE]\n\n"

    async def _end_stream(self, events: AsyncGenerator[Event], answer: Answer) -> None:
        """Nobody may have read it to its end: the client may have left between two tokens."""
        await events.aclose()
        await self._settle(answer)

    async def _settle(self, answer: Answer) -> None:
        """Tells the ledger and the canary's watch, once, and to the end: the request's own task may be cancelled."""
        if answer.settling is None and (answer.prompt_tokens or answer.is_fault):
            answer.settling = detached(self._emit(answer))
        if answer.settling is not None:
            await asyncio.shield(answer.settling)

    async def _emit(self, answer: Answer) -> None:
        if answer.prompt_tokens:
            await self.auth.record(answer.usage())
        # A client that leaves or is in a hurry says nothing against the version that answered it.
        if answer.model.canary is not None and (answer.is_whole or answer.is_fault):
            failed = not answer.is_whole
            await asyncio.to_thread(self.names.note, answer.model, failed=failed, first_token_s=answer.first_token_s)

    def _started(self, event: Event, answer: Answer) -> Started:
        """Raises HTTP's error of one that failed."""
        if isinstance(event, Failed):
            answer.fail(event)
            raise refusal_of(event)
        assert isinstance(event, Started)
        return event


async def resolved(
    names: ModelNames, name: str, *, session: str | None = None, may_use: MayUse = everything
) -> ServedModel:
    with registry_errors():
        return await asyncio.to_thread(names.resolve, name, session=session, may_use=may_use)


@contextlib.contextmanager
def registry_errors() -> Iterator[None]:
    """What a look into the registry may fail of, as HTTP's errors."""
    try:
        yield
    except NotFoundError as error:
        raise Refused(404, str(error), param="model", code="model_not_found") from None
    except FtrayError as error:  # the registry's store does not answer, say
        raise HTTPException(503, str(error)) from None


def deadline_of(headers: Headers, timeout_s: float | None) -> float | None:
    """On the event loop's clock: the caller's own, within the endpoint's."""
    asked = headers.get("x-request-timeout")
    try:
        seconds = [float(asked)] if asked else []
    except ValueError:
        seconds = [math.nan]
    if not all(math.isfinite(given) and given > 0 for given in seconds):
        raise HTTPException(400, f"X-Request-Timeout: {asked!r} is no number of seconds")
    seconds += [timeout_s] if timeout_s is not None else []
    return asyncio.get_running_loop().time() + min(seconds) if seconds else None


def head(answer: Answer, responses: Responses) -> dict:
    return {"id": f"{responses.prefix}-{answer.request_id}", "created": int(time.time()), "model": answer.model.id}


async def next_event(events: AsyncIterator[Event], deadline: float | None) -> Event:
    try:
        async with asyncio.timeout_at(deadline):
            return await anext(events)
    except TimeoutError:
        return Failed(DEADLINE_PASSED, 504)


async def until(events: AsyncIterator[Event], deadline: float | None) -> AsyncIterator[Event]:
    with contextlib.suppress(StopAsyncIteration):
        while True:
            yield await next_event(events, deadline)
