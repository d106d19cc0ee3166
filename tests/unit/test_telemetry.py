"""What an endpoint tells of its requests: metrics, access log, traces; and that a client that leaves is counted."""

import asyncio
import gzip
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest
from fake_endpoint import LocalLedger, ask, make_client

from ftray.infer.protocol import EngineStats
from ftray.registry import CanaryLimits
from ftray.serve.http.answer import Answer
from ftray.serve.http.ingress import Ingress
from ftray.serve.http.routes.paths import ANSWERING
from ftray.serve.protocol import Failed
from ftray.serve.routing.model_names import ModelNames, ServedModel
from ftray.serve.telemetry import metrics
from ftray.serve.telemetry.access_log import AccessLog
from ftray.serve.telemetry.metrics import AdapterMetrics, EngineMetrics, Names
from ftray.serve.telemetry.request_metrics import RequestMetrics
from ftray.serve.tenants.accounts import Accounts, Tenant
from ftray.serve.tenants.auth import Authenticator, Caller
from ftray.serve.tenants.rate_limits import RateLimiter


class KeptMeter:
    def __init__(self):
        self.reported: list[tuple] = []

    def add(self, metric, amount=1, /, **labels):
        assert set(labels) == set(metric.labels)
        self.reported.append((metric.name, amount, labels))

    set = observe = add

    def of(self, metric) -> list[tuple]:
        return [(amount, labels) for name, amount, labels in self.reported if name == metric.name]


@pytest.fixture
def accounts(tmp_path):
    return Accounts(str(tmp_path / "tenants.db"))


@pytest.fixture
def key(accounts):
    return accounts.create(Tenant("acme", requests_per_minute=3))


@pytest.fixture
def meter():
    return KeptMeter()


@pytest.fixture
def ingress(registry, backend, accounts):
    return Ingress(ModelNames("base-model", registry), backend, Authenticator(LocalLedger(RateLimiter(accounts))))


@pytest.fixture
def log_file(tmp_path):
    return tmp_path / "logs" / "access.jsonl"


@pytest.fixture
def client(ingress, meter, log_file, key):
    client = make_client(ingress, watchers=[RequestMetrics(meter, paths=ANSWERING), AccessLog(log_file)])
    client.headers["Authorization"] = f"Bearer {key}"
    return client


def test_an_answer_is_measured_by_model_and_tenant(client, meter):
    ask(client, "support", stream=True)
    asked = {"model": "support@2", "tenant": "acme"}
    assert meter.of(metrics.REQUESTS) == [(1, asked | {"status": "200"})]
    assert meter.of(metrics.PROMPT_TOKENS) == [(3, asked)]
    assert meter.of(metrics.COMPLETION_TOKENS) == [(2, asked)]
    assert meter.of(metrics.QUEUE) == [(0.5, asked)]
    assert meter.of(metrics.ADAPTER_WAIT) == [(0.25, asked)]
    (first, _), (total, _) = meter.of(metrics.FIRST_TOKEN)[0], meter.of(metrics.LATENCY)[0]
    assert 0 < first <= total
    assert meter.of(metrics.CUT) == []


def test_refusals_are_measured_without_a_name_that_anybody_could_invent(client, meter):
    ask(client, "no-such-model")
    client.get("/v1/models")
    for _ in range(3):
        ask(client, "support")
    client.headers["Authorization"] = "Bearer ftray-wrong"
    ask(client, "support")
    reported = [(labels["status"], labels["model"], labels["tenant"]) for _, labels in meter.of(metrics.REQUESTS)]
    served = ("200", "support@2", "acme")
    assert reported == [("404", "", "acme"), served, served, ("429", "", "acme"), ("401", "", "")]


def test_the_access_log_has_a_line_for_every_request_and_no_secret(client, log_file, key, backend):
    answered = ask(client, "support", stream=True)
    backend.error = Failed("too many", 429)
    ask(client, "support@1")
    client.post("/v1/chat/completions", content=b"x" * 5_000_000)
    client.get("/healthz")
    text = log_file.read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["status"] for line in lines] == [200, 429, 413]
    first, refused, _ = lines
    assert first["request_id"] == answered.headers["x-request-id"]
    assert answered.text.count(f'"chatcmpl-{first["request_id"]}"') > 1  # one id in all
    assert (first["model"], first["tenant"], first["asked_model"]) == ("support@2", "acme", "support")
    assert (first["prompt_tokens"], first["completion_tokens"], first["outcome"]) == (3, 2, "whole")
    assert "error" not in refused  # such messages quote what the client sent
    for secret in (key, "hi", "I am"):
        assert f'"{secret}' not in text


def test_a_client_that_leaves_between_two_tokens_is_counted(ingress, backend, accounts, log_file, key, meter):
    """The answer waits in `send`, where nothing of the ingress runs that could notice."""
    api = make_client(ingress, watchers=[AccessLog(log_file), RequestMetrics(meter, paths=ANSWERING)]).app

    async def leave() -> None:
        body = {"model": "support", "stream": True, "messages": [{"role": "user", "content": "hi"}]}
        content = json.dumps(body).encode()
        scope = httpx_scope("POST", "/v1/chat/completions", key)
        stuck = asyncio.Event()

        sent = iter([{"type": "http.request", "body": content}])

        async def receive():
            return next(sent, None) or await asyncio.sleep(60)

        async def send(message):
            if message["type"] == "http.response.body":
                stuck.set()
                await asyncio.sleep(60)

        request = asyncio.create_task(api(scope, receive, send))
        await stuck.wait()
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
        await asyncio.sleep(0.05)

    asyncio.run(leave())
    (row,) = accounts.usage(tenant="acme")
    assert (row["model"], row["cut"], row["completion_tokens"]) == ("support@2", 1, 1)
    assert backend.num_open == 0
    assert json.loads(log_file.read_text())["outcome"] == "cut"
    assert len(meter.of(metrics.CUT)) == 1


def test_a_client_that_leaves_says_nothing_against_a_canary(ingress, registry, key):
    registry.set_canary("support@3", "prod", 99.9, CanaryLimits(min_requests=1))
    canary = registry.canaries("support")["prod"]
    model = ServedModel("support@3", "support@3", "support@prod", canary, is_canary=True, stable="support@2")
    left = Answer(Caller(Tenant("acme"), None), model, "r1", prompt_tokens=3, completion_tokens=1)
    asyncio.run(ingress._settle(left))
    assert "prod" in registry.canaries("support")
    failed = Answer(Caller(Tenant("acme"), None), model, "r2", prompt_tokens=3, error="the replica died", is_fault=True)
    asyncio.run(ingress._settle(failed))
    assert registry.canaries("support") == {}


def httpx_scope(method: str, path: str, key: str) -> dict:
    headers = httpx.Headers({"authorization": f"Bearer {key}", "content-type": "application/json"})
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": headers.raw,
        "server": ("test", 80),
        "client": ("test", 1),
        "scheme": "http",
        "root_path": "",
    }


def test_traces_carry_the_callers_parent_and_no_text(ingress, key):
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from ftray.serve.telemetry.tracing import Traces

    kept = InMemorySpanExporter()
    client = make_client(ingress, watchers=[Traces(SimpleSpanProcessor(kept), paths=ANSWERING)])
    client.headers |= {"Authorization": f"Bearer {key}", "traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}
    ask(client, "support")
    client.get("/v1/models")
    (span,) = kept.get_finished_spans()
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == ("a" * 32, "b" * 16)
    reported = span.attributes
    assert (reported["gen_ai.request.model"], reported["gen_ai.response.model"]) == ("support", "support@2")
    assert (reported["gen_ai.usage.input_tokens"], reported["gen_ai.usage.output_tokens"]) == (3, 2)
    assert [event.name for event in span.events] == ["adapter in memory", "first token"]
    assert "hi" not in [str(value) for value in reported.values()]


def test_an_otlp_collector_gets_the_spans(ingress, key):
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    from ftray.serve.telemetry.tracing import otlp_traces

    got: list[ExportTraceServiceRequest] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            got.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    traces = otlp_traces(f"http://127.0.0.1:{server.server_port}", paths=ANSWERING)
    client = make_client(ingress, watchers=[traces])
    client.headers["Authorization"] = f"Bearer {key}"
    ask(client, "support")
    traces.close()  # sends what it has
    server.shutdown()
    (span,) = got[0].resource_spans[0].scope_spans[0].spans
    assert span.name == "POST /v1/chat/completions"


def test_the_dashboard_shows_every_metric_and_no_other():
    dashboard = json.loads((Path(__file__).parents[2] / "cluster/grafana/ftray-serving.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    variables = [v["query"]["query"] for v in dashboard["templating"]["list"] if v["type"] == "query"]
    shown = set(re.findall(r"ray_(ftray_\w+)", " ".join(queries + variables)))
    endings = {"counter": "_total", "histogram": "_bucket", "gauge": ""}
    told = {*metrics.OF_REQUESTS, *metrics.OF_REPLICAS} - {metrics.FIRST_TOKEN_OLD}
    assert shown == {m.name + endings[m.kind] for m in told}


def test_labels_are_bounded():
    names = Names(limit=2)
    assert [names(name) for name in ("a", "b", "c", "a")] == ["a", "b", metrics.OTHER, "a"]


def test_what_happens_to_adapters_is_measured(meter):
    reported = AdapterMetrics(meter)
    for event in ("miss", "loaded", "hit", "evicted", "miss", "failed"):
        reported.note(event, "a@1", 0.5)
    assert [labels["result"] for _, labels in meter.of(metrics.LOOKUPS)] == ["miss", "hit", "miss"]
    assert [labels["result"] for _, labels in meter.of(metrics.LOADS)] == ["ok", "failed"]
    assert meter.of(metrics.LOAD_SECONDS) == [(0.5, {})]


def test_preemptions_are_a_counter(meter):
    class Residency:
        resident_keys, resident_bytes, budget_bytes = ["a@1"], 10, 100

    reported = EngineMetrics(meter)
    for count in (0, 2, 2, 5):
        reported.measure(EngineStats(1, 2, count, 3, 4, 5, 6, ("a@1",), ("a@1",), 7), Residency())
    assert [amount for amount, _ in meter.of(metrics.PREEMPTIONS)] == [2, 3]
    assert meter.of(metrics.RESIDENT)[0] == (1, {"adapter": "a@1"})
    assert meter.of(metrics.ADAPTERS)[:2] == [(1, {"tier": "host"}), (1, {"tier": "device"})]
