"""The endpoint's HTTP application: its routes, its errors in OpenAI's shape, and what watches them."""

import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from ftray.config.serve import ServeConfig
from ftray.serve.http.body_limits import BodyLimits
from ftray.serve.http.context import Watched, Watcher
from ftray.serve.http.entrance import Entrance, LocalOnly
from ftray.serve.http.refusals import Refused
from ftray.serve.http.routes import ROUTES, Routes
from ftray.serve.http.services import Services
from ftray.serve.openai.schemas import ChatRequest, CompletionRequest, error_body

ALL_FIELDS = {*ChatRequest.model_fields, *CompletionRequest.model_fields}


def make_api(
    services: Services,
    config: ServeConfig,
    *,
    watchers: Sequence[Watcher] = (),
    routes: Sequence[Routes] = ROUTES,
) -> FastAPI:
    # No page of documentation: FastAPI's loads its scripts from elsewhere.
    api = FastAPI(title="ftray", docs_url=None, redoc_url=None, redirect_slashes=False)
    limits, auth = config.limits, services.ingress.auth
    api.add_middleware(BodyLimits, max_bytes=limits.body_bytes, timeout_s=limits.body_timeout_s)
    api.add_middleware(
        Entrance,
        auth=auth,
        header_bytes=limits.header_bytes,
        ignore_unknown=config.unknown_fields == "ignore",
    )
    if config.cors.origins:
        api.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors.origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    if auth.is_open and config.is_local:
        api.add_middleware(LocalOnly, hosts=config.allowed_hosts, origins=config.cors.origins)
    api.add_middleware(Watched, watchers=watchers)  # the last one added is the outermost
    add_errors(api)
    for make_router in routes:
        api.include_router(make_router(services))
    return api


def add_errors(api: FastAPI) -> None:
    @api.exception_handler(RequestValidationError)
    async def invalid(_: Any, error: RequestValidationError) -> JSONResponse:
        message, param = described(error.errors()[0])
        return JSONResponse(error_body(message, 400, param=param), status_code=400)

    @api.exception_handler(StarletteHTTPException)  # FastAPI's too; unknown paths and methods
    async def refused(request: Request, error: StarletteHTTPException) -> JSONResponse:
        said = {"param": error.param, "code": error.code} if isinstance(error, Refused) else {}
        message, status = str(error.detail), error.status_code
        if not isinstance(error, HTTPException):  # the router's own
            message = f"there is no {request.method} {request.url.path:.200} here"
            if request.method == "POST" and request.url.path.startswith("/v1/"):
                status = 400  # proxies such as LiteLLM's take a 404 for a model that is gone, and leave it out for all
        busy = {"Retry-After": "1"} if status in (429, 503) and said.get("code") != "insufficient_quota" else {}
        return JSONResponse(
            error_body(message, status, **said), status_code=status, headers=busy | dict(error.headers or {})
        )


def described(problem: Mapping[str, Any]) -> tuple[str, str | None]:
    """What is wrong with a body, in words of this API, and the parameter."""
    if problem["type"] == "json_invalid":
        return f"the body is no JSON: {problem.get('ctx', {}).get('error', '')} at character {problem['loc'][-1]}", None
    place = list(problem["loc"])[1:] if problem["loc"][:1] == ("body",) else list(problem["loc"])
    if not place and problem["type"] in ("model_attributes_type", "dict_type", "missing"):
        return "the body must be a JSON object, sent with Content-Type: application/json", None
    # Of one of several kinds, pydantic adds the kind to the place.
    names = list(takewhile(lambda part: isinstance(part, int) or re.fullmatch(r"[a-z_0-9]+", str(part)), place))
    rule = "this endpoint has no such parameter" if problem["type"] == "extra_forbidden" else problem["msg"]
    rule = rule.removeprefix("Value error, ")
    if not names:  # a rule of several parameters begins with one of them
        first = re.match(r"([a-z_]+)(:| )", rule)
        return rule, first[1] if first is not None and first[1] in ALL_FIELDS else None
    param = ".".join(map(str, names))
    return f"{param}: {rule}", param
