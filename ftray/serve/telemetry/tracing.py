"""Requests as OpenTelemetry spans, under the names of its conventions for generative AI
(https://opentelemetry.io/docs/specs/semconv/gen-ai/). A caller's `traceparent` is the parent."""

from typing import Any

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanProcessor
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from ftray.serve.http.context import RequestContext

OPERATIONS = {"/v1/chat/completions": "chat", "/v1/embeddings": "embeddings"}


class Traces:
    """A watcher of requests that have ended."""

    def __init__(self, processor: SpanProcessor, *, paths: tuple[str, ...]):
        # A provider of our own: Ray has a global one, for itself.
        self._provider = TracerProvider(resource=Resource.create({"service.name": "ftray"}))
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("ftray.serve")
        self._paths = frozenset(paths)

    def __call__(self, context: RequestContext) -> None:
        if context.path not in self._paths:
            return
        given = context.headers.get("traceparent")
        parent = TraceContextTextMapPropagator().extract({"traceparent": given}) if given else None
        span = self._tracer.start_span(
            f"{context.method} {context.path}",
            context=parent,
            kind=trace.SpanKind.SERVER,
            start_time=nanoseconds(context.at),
            attributes=attributes_of(context),
        )
        answer = context.answer
        if context.status >= 500 or (answer is not None and answer.error is not None):
            span.set_status(trace.StatusCode.ERROR)
        if answer is not None and answer.first_token_s is not None:
            queued = context.at + answer.adapter_s
            span.add_event("adapter in memory", timestamp=nanoseconds(queued))
            span.add_event("first token", timestamp=nanoseconds(context.at + answer.first_token_s))
        span.end(nanoseconds(context.at + context.seconds))

    def close(self) -> None:
        self._provider.shutdown()


def otlp_traces(endpoint: str, *, paths: tuple[str, ...]) -> Traces:
    """`endpoint`: a collector's, such as http://collector:4318; spans are sent in batches, by a thread."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return Traces(BatchSpanProcessor(OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces")), paths=paths)


def attributes_of(context: RequestContext) -> dict[str, Any]:
    reported: dict[str, Any] = {
        "gen_ai.operation.name": OPERATIONS.get(context.path, "text_completion"),
        "gen_ai.request.model": context.asked_model,
        "http.response.status_code": context.status,
        "ftray.request_id": context.request_id,
        "ftray.tenant": context.tenant or None,
    }
    answer = context.answer
    if answer is not None:
        reported |= {
            "gen_ai.response.model": answer.model.id,
            "gen_ai.usage.input_tokens": answer.prompt_tokens,
            "gen_ai.usage.output_tokens": answer.completion_tokens,
            "gen_ai.server.time_to_first_token": answer.first_token_s,
            "gen_ai.server.time_per_output_token": answer.token_s,
            "ftray.adapter_seconds": answer.adapter_s,
            "ftray.queue_seconds": answer.queue_s,
        }
    return {key: value for key, value in reported.items() if value is not None}


def nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
