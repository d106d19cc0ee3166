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
    def choice(index: int, answer: Event) -> dict:
        message = {"role": "assistant", "content": answer["text"]}
        return ChatShape._around(index, answer, {"message": message})

    @staticmethod
    def delta(index: int, answer: Event, *, first: bool) -> dict:
        role = {"role": "assistant"} if first else {}
        return ChatShape._around(index, answer, {"delta": role | {"content": answer["text"]}})

    @staticmethod
    def _around(index: int, answer: Event, body: dict) -> dict:
        told = [
            token_body(entry) | {"top_logprobs": [token_body(top) for top in entry["top"]]}
            for entry in answer["logprobs"]
        ]
        logprobs = {"content": told} if told else None
        return {"index": index, **body, "logprobs": logprobs, "finish_reason": answer["finish_reason"]}


class CompletionShape:
    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"

    @staticmethod
    def choice(index: int, answer: Event) -> dict:
        told = answer["logprobs"]
        logprobs = {
            "tokens": [entry["token"] for entry in told],
            "token_logprobs": [entry["logprob"] for entry in told],
            "top_logprobs": [{top["token"]: top["logprob"] for top in entry["top"]} for entry in told],
        }
        return {
            "index": index,
            "text": answer["text"],
            "logprobs": logprobs if told else None,
            "finish_reason": answer["finish_reason"],
        }

    @staticmethod
    def delta(index: int, answer: Event, *, first: bool) -> dict:
        return CompletionShape.choice(index, answer)


def token_body(entry: Event) -> dict:
    """`bytes` is null for a token that holds only part of a character."""
    text = entry["token"]
    return {
        "token": text,
        "logprob": entry["logprob"],
        "bytes": None if "\ufffd" in text else list(text.encode()),
    }


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
        job = GenerateJob(request.messages, True, request.sampling(), model.adapter, request.user or "")
        return await self._answer(request, model, job, ChatShape)

    async def completion(self, request: CompletionRequest) -> Any:
        model = await self._resolve(request.model)
        job = GenerateJob(request.prompt, False, request.sampling(), model.adapter, request.user or "")
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
                "choices": [shape.choice(index, answer) for index, answer in enumerate(event["answers"])],
                "usage": usage_body(event["prompt_tokens"], event["completion_tokens"], event["cached_tokens"]),
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
    completion_tokens, cached_tokens = 0, 0
    opened: set[int] = set()
    async for event in events:
        if "error" in event:
            yield server_event(error_body(event["error"], status=event["status"]))
            return
        completion_tokens += 1
        index = event["index"]
        if index == 0:  # the others find what the first computed
            cached_tokens = event["cached_tokens"]
        if event["text"] or event["finish_reason"] or event["logprobs"] or index not in opened:
            delta = shape.delta(index, event, first=index not in opened)
            yield server_event(head | {"choices": [delta]} | no_usage)
            opened.add(index)
    if include_usage:
        usage = usage_body(first["prompt_tokens"], completion_tokens, cached_tokens)
        yield server_event(head | {"choices": [], "usage": usage})
    yield "data: [DONE]\n\n"


def server_event(body: dict) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def raise_if_error(event: Event) -> None:
    if "error" in event:
        raise HTTPException(event["status"], event["error"])
