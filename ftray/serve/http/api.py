"""The endpoint's HTTP application: its routes, its errors in OpenAI's shape, and what watches them."""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from ftray.config.serve import LimitsConfig
from ftray.serve.http.body_limits import BodyLimits
from ftray.serve.http.context import Watched, Watcher
from ftray.serve.http.routes import ROUTES, Routes
from ftray.serve.http.services import Services
from ftray.serve.openai.schemas import error_body
from ftray.serve.tenants.auth import BudgetSpent


def make_api(
    services: Services,
    limits: LimitsConfig,
    *,
    watchers: Sequence[Watcher] = (),
    routes: Sequence[Routes] = ROUTES,
) -> FastAPI:
    api = FastAPI(title="ftray", docs_url="/docs")
    api.add_middleware(BodyLimits, max_bytes=limits.body_bytes, timeout_s=limits.body_timeout_s)
    api.add_middleware(Watched, watchers=watchers)  # the last one added is the outermost
    add_errors(api)
    for make_router in routes:
        api.include_router(make_router(services))
    return api


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
