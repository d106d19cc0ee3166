"""Every request that has ended, to the meter."""

from collections.abc import Sequence

from ftray.serve.http.context import RequestContext
from ftray.serve.telemetry.metrics import (
    ADAPTER_WAIT,
    CACHED_TOKENS,
    COMPLETION_TOKENS,
    CUT,
    FIRST_TOKEN,
    FIRST_TOKEN_OLD,
    LATENCY,
    PER_TOKEN,
    PROMPT_TOKENS,
    QUEUE,
    REQUESTS,
    Meter,
    Names,
)


class RequestMetrics:
    """A watcher of requests that have ended."""

    def __init__(self, meter: Meter, *, paths: Sequence[str]):
        """`paths`: what counts as a request; not the looking and the listing."""
        self._meter = meter
        self._paths = frozenset(paths)
        self._models, self._tenants = Names(), Names()

    def __call__(self, context: RequestContext) -> None:
        if context.path not in self._paths:
            return
        # Of a refused request only a name that is served would be a label; whether it is, is not known here.
        model = self._models(context.model) if context.model is not None else ""
        asked = {"model": model, "tenant": self._tenants(context.tenant)}
        self._meter.add(REQUESTS, **asked, status=str(context.status))
        answer = context.answer
        if answer is None or not answer.prompt_tokens:
            return
        if not answer.is_whole:
            self._meter.add(CUT, **asked)
        for metric, count in (
            (PROMPT_TOKENS, answer.prompt_tokens),
            (CACHED_TOKENS, answer.cached_tokens),
            (COMPLETION_TOKENS, answer.completion_tokens),
        ):
            if count:
                self._meter.add(metric, count, **asked)
        self._meter.observe(ADAPTER_WAIT, answer.adapter_s, **asked)
        self._meter.observe(LATENCY, context.seconds, **asked)
        if answer.queue_s is not None:
            self._meter.observe(QUEUE, answer.queue_s, **asked)
        if answer.first_token_s is not None:
            for metric in (FIRST_TOKEN, FIRST_TOKEN_OLD):
                self._meter.observe(metric, answer.first_token_s, **asked)
        if answer.token_s is not None:
            self._meter.observe(PER_TOKEN, answer.token_s, **asked)
