"""One JSON line for each request: who, which model, how much, how long. Never a prompt, an answer, or a key."""

import json
import logging
import sys
import time
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from ftray.serve.http.context import RequestContext

MAX_BYTES, MAX_FILES = 64 * 2**20, 5
MAX_NAME = 200  # of a path or model that was asked for: a caller chooses it
log = logging.getLogger("ftray.serve")
UNLOGGED = ("/healthz", "/ftray/status", "/-/routes")  # asked for all the time


class Lines(RotatingFileHandler):
    """A full disk is said once, not with every request, and once that it is over."""

    _is_failing = False
    _num_lost = 0

    def emit(self, record: logging.LogRecord) -> None:
        before = self._num_lost
        super().emit(record)
        if self._is_failing and self._num_lost == before:
            self._is_failing = False
            log.warning("the access log is written again; it lacks %d lines", self._num_lost)
            self._num_lost = 0

    def handleError(self, record: logging.LogRecord) -> None:
        self._num_lost += 1
        if not self._is_failing:
            self._is_failing = True
            log.error("the access log %s cannot be written: %s", self.baseFilename, sys.exc_info()[1])


class AccessLog:
    """A watcher of requests that have ended."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._handler = Lines(path, maxBytes=MAX_BYTES, backupCount=MAX_FILES, encoding="utf-8")

    def __call__(self, context: RequestContext) -> None:
        if context.path in UNLOGGED:
            return
        line = json.dumps(record_of(context))
        self._handler.emit(logging.makeLogRecord({"msg": line}))


def record_of(context: RequestContext) -> dict[str, Any]:
    reported: dict[str, Any] = {
        "at": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(context.at)) + f".{context.at % 1 * 1000:03.0f}Z",
        "request_id": context.request_id,
        "method": context.method,
        "path": context.path[:MAX_NAME],
        "status": context.status,
        "ms": milliseconds(context.seconds),
        "tenant": context.tenant or None,
        "asked_model": context.asked_model[:MAX_NAME] if context.asked_model is not None else None,
        "stream": context.is_stream or None,
    }
    answer = context.answer
    if answer is not None:
        reported |= {
            "model": answer.model.id,
            "canary": answer.model.is_canary or None,
            "outcome": answer.outcome if answer.prompt_tokens else None,
            # What a client did wrong is told to it alone: such messages quote what it sent.
            "error": answer.error[:MAX_NAME] if answer.error is not None and answer.is_fault else None,
            "prompt_tokens": answer.prompt_tokens,
            "cached_tokens": answer.cached_tokens,
            "completion_tokens": answer.completion_tokens,
            "adapter_ms": milliseconds(answer.adapter_s),
            "queue_ms": milliseconds(answer.queue_s),
            "first_token_ms": milliseconds(answer.first_token_s),
            "token_ms": milliseconds(answer.token_s),
        }
    return {key: value for key, value in reported.items() if value is not None}


def milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 1)
