"""The playground at `/`: its three files, and the data that it asks for."""

import mimetypes
from collections.abc import Callable
from importlib.resources import files
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response

from ftray.serve.http.services import Context, Services

MAX_NAMES = 8
PAGE = {"/": "index.html", "/page.css": "page.css", "/page.js": "page.js"}
HEADERS = {
    # Nothing from elsewhere, and nobody may put the page into theirs.
    "Content-Security-Policy": "default-src 'self'; img-src data:; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def page_routes(services: Services) -> APIRouter:
    router, overview = APIRouter(), services.overview

    @router.get("/ftray/status")
    async def status(context: Context, name: Annotated[list[str] | None, Query()] = None) -> Any:
        return await overview.status(context, names=(name or [])[:MAX_NAMES])

    @router.get("/ftray/card")
    async def card(model: str, context: Context) -> Any:
        return await overview.card(model, context)

    for path, file in PAGE.items():
        router.add_api_route(path, page_file(file), include_in_schema=False)
    return router


def page_file(name: str) -> Callable[[], Response]:
    content = files("ftray.serve.http").joinpath("page", name).read_bytes()

    def send() -> Response:
        return Response(content, media_type=mimetypes.guess_type(name)[0], headers=HEADERS)

    return send
