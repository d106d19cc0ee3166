"""The endpoint's HTTP application: its routes, its errors in OpenAI's shape, and what watches them."""

import mimetypes
from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from ftray.config.serve import LimitsConfig
from ftray.serve.http.body_limits import BodyLimits
from ftray.serve.http.context import RequestContext, Watched, Watcher
from ftray.serve.http.embeddings import DetokenizeRequest, EmbeddingRequest, EmbeddingRoutes, TokenizeRequest
from ftray.serve.http.ingress import Ingress
from ftray.serve.http.playground import Overview
from ftray.serve.openai.schemas import AdapterRequest, ChatRequest, CompletionRequest, error_body
from ftray.serve.tenants.auth import BudgetSpent

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
MAX_NAMES = 8
PAGE = {"/": "index.html", "/page.css": "page.css", "/page.js": "page.js"}
PAGE_HEADERS = {
    # Nothing from elsewhere, and nobody may put the page into theirs.
    "Content-Security-Policy": "default-src 'self'; img-src data:; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
ANSWERING = (CHAT, COMPLETIONS, EMBEDDINGS)  # what metrics and traces count


def context_of(request: Request) -> RequestContext:
    return request.state.context


Asked = Annotated[RequestContext, Depends(context_of)]


def make_api(
    ingress: Ingress,
    routes: EmbeddingRoutes,
    overview: Overview,
    limits: LimitsConfig,
    *,
    watchers: Sequence[Watcher] = (),
) -> FastAPI:
    api = FastAPI(title="ftray", docs_url="/docs")
    api.add_middleware(BodyLimits, max_bytes=limits.body_bytes, timeout_s=limits.body_timeout_s)
    api.add_middleware(Watched, watchers=watchers)  # the last one added is the outermost
    add_errors(api)

    @api.post(CHAT)
    async def chat_completions(request: ChatRequest, asked: Asked) -> Any:
        return await ingress.chat(request, asked)

    @api.post(COMPLETIONS)
    async def completions(request: CompletionRequest, asked: Asked) -> Any:
        return await ingress.completion(request, asked)

    @api.post(EMBEDDINGS)
    async def embeddings(request: EmbeddingRequest, asked: Asked) -> Any:
        return await routes.embed(request, asked)

    @api.post("/tokenize")
    async def tokenize(request: TokenizeRequest, asked: Asked) -> Any:
        return await routes.tokenize(request, asked)

    @api.get("/tokenizer_info")
    async def tokenizer_info(asked: Asked) -> Any:
        return await routes.tokenizer_info(asked)

    @api.post("/detokenize")
    async def detokenize(request: DetokenizeRequest, asked: Asked) -> Any:
        return await routes.detokenize(request, asked)

    @api.get("/v1/models")
    async def models(asked: Asked) -> Any:
        return await ingress.models(asked)

    @api.post("/ftray/warm")
    async def warm(request: AdapterRequest, asked: Asked) -> Any:
        return await ingress.warm(request.model, asked)

    @api.post("/ftray/in_use")
    async def in_use(request: AdapterRequest, asked: Asked) -> Any:
        return await ingress.in_use(request.model, asked)

    @api.get("/ftray/status")
    async def status(asked: Asked, name: Annotated[list[str] | None, Query()] = None) -> Any:
        return await overview.status(asked, names=(name or [])[:MAX_NAMES])

    @api.get("/ftray/card")
    async def card(model: str, asked: Asked) -> Any:
        return await overview.card(model, asked)

    @api.get("/healthz")
    async def health() -> Any:
        return {"status": "ok"}

    for path, file in PAGE.items():
        api.add_api_route(path, page_file(file), include_in_schema=False)
    return api


def page_file(name: str) -> Callable[[], Response]:
    content = files("ftray.serve.http").joinpath("page", name).read_bytes()

    def send() -> Response:
        return Response(content, media_type=mimetypes.guess_type(name)[0], headers=PAGE_HEADERS)

    return send


def add_errors(api: FastAPI) -> None:
    @api.exception_handler(RequestValidationError)
    async def invalid(_: Any, error: RequestValidationError) -> JSONResponse:
        problem = error.errors()[0]
        parameter = ".".join(str(part) for part in problem["loc"] if part != "body")
        rule = "this endpoint has no such parameter" if problem["type"] == "extra_forbidden" else problem["msg"]
        return JSONResponse(error_body(f"{parameter}: {rule}", status=400, param=parameter), status_code=400)

    @api.exception_handler(StarletteHTTPException)  # FastAPI's too; unknown paths and methods
    async def refused(_: Any, error: StarletteHTTPException) -> JSONResponse:
        param = "model" if error.status_code == 404 else None
        is_spent = isinstance(error, BudgetSpent)
        busy = {"Retry-After": "1"} if error.status_code in (429, 503) and not is_spent else {}
        code = "insufficient_quota" if is_spent else None
        return JSONResponse(
            error_body(str(error.detail), status=error.status_code, param=param, code=code),
            status_code=error.status_code,
            headers=busy | dict(error.headers or {}),
        )
