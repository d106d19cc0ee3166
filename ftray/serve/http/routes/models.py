"""What may be asked, and whether anybody answers."""

from typing import Any

from fastapi import APIRouter

from ftray.serve.http.services import Context, Services


def model_routes(services: Services) -> APIRouter:
    router, ingress = APIRouter(), services.ingress

    @router.get("/v1/models")
    async def models(context: Context) -> Any:
        return await ingress.models(context)

    @router.get("/v1/models/{name:path}")
    async def model(name: str, context: Context) -> Any:
        return await ingress.model(name, context)

    @router.get("/healthz")
    async def health() -> Any:
        return {"status": "ok"}

    return router
