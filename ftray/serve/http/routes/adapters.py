"""Versions in the replicas' memory, for `ftray adapters promote` and `canary`."""

from typing import Any

from fastapi import APIRouter

from ftray.serve.http.services import Context, Services
from ftray.serve.openai.schemas import AdapterRequest


def adapter_routes(services: Services) -> APIRouter:
    router, ingress = APIRouter(), services.ingress

    @router.post("/ftray/warm")
    async def warm(request: AdapterRequest, context: Context) -> Any:
        return await ingress.warm(request.model, context)

    @router.post("/ftray/in_use")
    async def in_use(request: AdapterRequest, context: Context) -> Any:
        return await ingress.in_use(request.model, context)

    return router
