"""Answers by the engine: chats and completions, whole and in chunks."""

from typing import Any

from fastapi import APIRouter

from ftray.serve.http.routes.paths import CHAT, COMPLETIONS
from ftray.serve.http.services import Context, Services
from ftray.serve.openai.schemas import ChatRequest, CompletionRequest


def answer_routes(services: Services) -> APIRouter:
    router, ingress = APIRouter(), services.ingress

    @router.post(CHAT)
    async def chat_completions(request: ChatRequest, context: Context) -> Any:
        return await ingress.chat(request, context)

    @router.post(COMPLETIONS)
    async def completions(request: CompletionRequest, context: Context) -> Any:
        return await ingress.completion(request, context)

    return router
