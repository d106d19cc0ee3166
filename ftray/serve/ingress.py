"""The HTTP side: OpenAI's routes over an abstract backend, so that it runs without ray in a test."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any, Protocol

from fastapi import FastAPI, HTTPException
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse

from ftray.errors import FtrayError, NotFoundError
from ftray.serve.models import ModelNames, ServedModel
from ftray.serve.replica import Event, GenerateJob
from ftray.serve.schemas import ApiRequest, ChatRequest, CompletionRequest, error_body, usage_body


class Backend(Protocol):
    """The replicas, wherever they are."""

    async def complete(self, job: GenerateJob) -> Event: ...

    def stream(self, job: GenerateJob) -> AsyncIterator[Event]: ...


class ChatShape:
    """How a chat answer is laid out, whole and in chunks."""

    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    @staticmethod
    def choice(text: str, reason: str | None) -> dict:
        return {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "logprobs": None,
            "finish_reason": reason,
        }

    @staticmethod
    def delta(text: str, reason: str | None, *, first: bool) -> dict:
        role = {"role": "assistant"} if first else {}
        return {"index": 0, "delta": role | {"content": text}, "logprobs": None, "finish_reason": reason}


class CompletionShape:
    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"

    @staticmethod
    def choice(text: str, reason: str | None) -> dict:
        return {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}

    @staticmethod
    def delta(text: str, reason: str | None, *, first: bool) -> dict:
        return CompletionShape.choice(text, reason)


Shape = type[ChatShape] | type[CompletionShape]


def make_api() -> FastAPI:
    """The application's shell; the routes are added by `add_routes` once there is a backend."""
    api = FastAPI(title="ftray", docs_url="/docs")

    @api.exception_handler(RequestValidationError)
    async def invalid(_: Any, error: RequestValidationError) -> JSONResponse:
        problem = error.errors()[0]
        parameter = ".".join(str(part) for part in problem["loc"] if part != "body")
        rule = "this endpoint has no such parameter" if problem["type"] == "extra_forbidden" else problem["msg"]
        return JSONResponse(error_body(f"{parameter}: {rule}", status=400, param=parameter), status_code=400)

    @api.exception_handler(HTTPException)
    async def refused(_: Any, error: HTTPException) -> JSONResponse:
        param = "model" if error.status_code == 404 else None
        return JSONResponse(
            error_body(str(error.detail), status=error.status_code, param=param),
            status_code=error.status_code,
            headers={"Retry-After": "1"} if error.status_code == 429 else None,
        )

    return api


class Ingress:
    def __init__(self, names: ModelNames, backend: Backend):
        self.names = names
        self.backend = backend

    async def chat(self, request: ChatRequest) -> Any:
        model = await self._resolve(request.model)
        sampling = request.sampling(request.max_new_tokens)
        return await self._answer(
            request, model, GenerateJob(request.messages, True, sampling, model.adapter), ChatShape
        )

    async def completion(self, request: CompletionRequest) -> Any:
        model = await self._resolve(request.model)
        sampling = request.sampling(request.max_new_tokens)
        job = GenerateJob(request.prompt, False, sampling, model.adapter)
        return await self._answer(request, model, job, CompletionShape)

    async def models(self) -> dict:
        return await asyncio.to_thread(self.names.listing)

    async def _resolve(self, name: str) -> ServedModel:
        try:
            return await asyncio.to_thread(self.names.resolve, name)
        except NotFoundError as error:
            raise HTTPException(404, str(error)) from None
        except FtrayError as error:  # the registry's store does not answer, say
            raise HTTPException(503, str(error)) from None

    async def _answer(self, request: ApiRequest, model: ServedModel, job: GenerateJob, shape: Shape) -> Any:
        head = {"id": f"{shape.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model.id}
        if not request.stream:
            event = await self.backend.complete(job)
            raise_if_error(event)
            return head | {
                "object": shape.whole,
                "choices": [shape.choice(event["text"], event["finish_reason"])],
                "usage": usage_body(event["prompt_tokens"], event["completion_tokens"]),
            }
        events = self.backend.stream(job)
        first = await anext(events)
        raise_if_error(first)
        chunks = stream_chunks(events, first, head, shape, include_usage=request.include_usage)
        return StreamingResponse(chunks, media_type="text/event-stream")


async def stream_chunks(
    events: AsyncIterator[Event], first: Event, head: dict, shape: Shape, *, include_usage: bool
) -> AsyncIterator[str]:
    head = head | {"object": shape.chunk}
    no_usage = {"usage": None} if include_usage else {}
    completion_tokens, opening = 0, True
    async for event in events:
        if "error" in event:
            yield server_event(error_body(event["error"], status=event["status"]))
            return
        completion_tokens = event["completion_tokens"]
        if event["text"] or event["finish_reason"] or opening:
            delta = shape.delta(event["text"], event["finish_reason"], first=opening)
            yield server_event(head | {"choices": [delta]} | no_usage)
            opening = False
    if include_usage:
        yield server_event(head | {"choices": [], "usage": usage_body(first["prompt_tokens"], completion_tokens)})
    yield "data: [DONE]\n\n"


def server_event(body: dict) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def raise_if_error(event: Event) -> None:
    if "error" in event:
        raise HTTPException(event["status"], event["error"])
