"""Embeddings, and texts to token ids and back: what is answered at once, by one replica."""

import asyncio
import base64
import struct
from dataclasses import replace
from typing import Any, Literal, Protocol, TypeVar

from fastapi import HTTPException
from pydantic import Field

from ftray.serve.http.answer import Answer
from ftray.serve.http.context import RequestContext, detached
from ftray.serve.http.ingress import DEADLINE_PASSED, deadline_of, resolved
from ftray.serve.http.refusals import refusal_of
from ftray.serve.openai.body import RequestBody
from ftray.serve.openai.schemas import MAX_PROMPTS, Inputs, UserName, as_list
from ftray.serve.openai.tools import Tool, as_given
from ftray.serve.protocol import (
    EmbedJob,
    Failed,
    PlainText,
    QuickAnswer,
    QuickJob,
    TokenIds,
    TokenizeJob,
    TokenizerInfo,
    TokenizerInfoJob,
    Vectors,
)
from ftray.serve.routing.model_names import ModelNames
from ftray.serve.tenants.auth import Authenticator

T = TypeVar("T")


class EmbeddingRequest(RequestBody):
    """OpenAI's."""

    model: str
    input: Inputs
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(default=None, ge=1)  # the first so many, normalised again (Matryoshka)
    user: UserName | None = None


class TokenizeRequest(RequestBody):
    """vLLM's."""

    model: str | None = None  # whose rendering of messages it is; all share one tokenizer
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(RequestBody):
    model: str | None = None
    tokens: list[int]


class AskedReplica(Protocol):
    async def ask(self, job: QuickJob) -> QuickAnswer: ...


class Embeddings:
    def __init__(
        self, names: ModelNames, replica: AskedReplica, auth: Authenticator, *, timeout_s: float | None = None
    ):
        self._names = names
        self._replica = replica
        self._auth = auth
        self._timeout_s = timeout_s

    async def embed(self, request: EmbeddingRequest, context: RequestContext) -> dict[str, Any]:
        context.asked_model = request.model
        texts = checked(as_list(request.input))
        caller = await self._auth.admit(context)
        model = await resolved(self._names, request.model, session=caller.session, may_use=caller.tenant.may_use)
        answer = context.answer = Answer(caller, model, context.request_id, context.began)
        job = EmbedJob(texts, model.adapter, request.dimensions, caller.tenant.name, request.user or "")
        found = await self._embedded(answer, job, deadline_of(context.headers, self._timeout_s))
        answer.prompt_tokens, answer.is_whole = found.prompt_tokens, True
        await asyncio.shield(detached(self._auth.record(answer.usage())))  # also when the client has gone
        model = answer.model
        encoded = base64_of if request.encoding_format == "base64" else list[float]
        return {
            "object": "list",
            "model": model.id,
            "data": [
                {"object": "embedding", "index": index, "embedding": encoded(vector)}
                for index, vector in enumerate(found.vectors)
            ],
            "usage": {"prompt_tokens": answer.prompt_tokens, "total_tokens": answer.prompt_tokens},
        }

    async def _embedded(self, answer: Answer, job: EmbedJob, deadline: float | None) -> Vectors:
        """What a canary cannot answer the stable version does."""
        while True:
            tried = answer.model
            try:
                async with asyncio.timeout_at(deadline):
                    found = await self._replica.ask(replace(job, adapter=tried.adapter))
            except TimeoutError:
                raise HTTPException(504, DEADLINE_PASSED) from None
            failed = isinstance(found, Failed) and found.is_fault
            if tried.canary is not None and (failed or not isinstance(found, Failed)):
                # Vectors have no first token: only failures are compared.
                await asyncio.to_thread(self._names.note, tried, failed=failed, first_token_s=None)
            if not failed or not tried.is_canary:
                return expect(Vectors, found)
            answer.model = tried.fallback

    async def tokenize(self, request: TokenizeRequest, context: RequestContext) -> dict[str, Any]:
        if (request.prompt is None) == (request.messages is None):
            raise HTTPException(400, "prompt or messages: give one of them")
        caller, adapter = await self._auth.admit(context), None
        if request.model is not None and request.messages is not None:
            may_use = caller.tenant.may_use
            adapter = (await resolved(self._names, request.model, session=caller.session, may_use=may_use)).adapter
        job = TokenizeJob(
            request.prompt,
            request.messages,
            as_given(request.tools or []),
            with_special=request.add_special_tokens,
            with_strings=request.return_token_strs,
            adapter=adapter,
        )
        found = expect(TokenIds, await self._replica.ask(job))
        return {
            "count": len(found.ids),
            "max_model_len": found.context_tokens,
            "tokens": found.ids,
            "token_strs": found.strings,
        }

    async def tokenizer_info(self, context: RequestContext) -> dict[str, Any]:
        await self._auth.tenant(context)
        return vars(expect(TokenizerInfo, await self._replica.ask(TokenizerInfoJob())))

    async def detokenize(self, request: DetokenizeRequest, context: RequestContext) -> dict[str, Any]:
        await self._auth.admit(context)
        return {"prompt": expect(PlainText, await self._replica.ask(TokenizeJob(ids=request.tokens))).text}


def expect(kind: type[T], found: QuickAnswer) -> T:
    """Raises HTTP's error of one that failed."""
    if isinstance(found, Failed):
        raise refusal_of(found)
    assert isinstance(found, kind)
    return found


def checked(texts: list[Any]) -> list[Any]:
    if not texts or not all(texts):
        raise HTTPException(400, "input: an empty text has no embedding")
    if len(texts) > MAX_PROMPTS:
        raise HTTPException(400, f"input: at most {MAX_PROMPTS} texts in one request")
    return texts


def base64_of(vector: list[float]) -> str:
    """Little-endian float32, as OpenAI's clients read it."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
