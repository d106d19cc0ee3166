"""Embeddings, and texts to token ids and back."""

from typing import Any

from fastapi import APIRouter

from ftray.serve.http.embeddings import DetokenizeRequest, EmbeddingRequest, TokenizeRequest
from ftray.serve.http.routes.paths import EMBEDDINGS
from ftray.serve.http.services import Context, Services


def embedding_routes(services: Services) -> APIRouter:
    router, embeddings = APIRouter(), services.embeddings

    @router.post(EMBEDDINGS)
    async def embed(request: EmbeddingRequest, context: Context) -> Any:
        return await embeddings.embed(request, context)

    @router.post("/tokenize")
    async def tokenize(request: TokenizeRequest, context: Context) -> Any:
        return await embeddings.tokenize(request, context)

    @router.get("/tokenizer_info")
    async def tokenizer_info(context: Context) -> Any:
        return await embeddings.tokenizer_info(context)

    @router.post("/detokenize")
    async def detokenize(request: DetokenizeRequest, context: Context) -> Any:
        return await embeddings.detokenize(request, context)

    return router
