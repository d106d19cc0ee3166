"""What callers may not do to an endpoint, by malice or bad luck."""

import json

import pytest
from fake_endpoint import DIED, LocalLedger, ask, make_client

from ftray.errors import FtrayError
from ftray.model.chat import read_messages
from ftray.registry import CanaryLimits
from ftray.serve.http.ingress import Ingress
from ftray.serve.protocol import Failed
from ftray.serve.replica.admission import Admission
from ftray.serve.routing.model_names import ModelNames
from ftray.serve.telemetry.access_log import AccessLog
from ftray.serve.tenants.accounts import Accounts, Tenant
from ftray.serve.tenants.auth import Authenticator
from ftray.serve.tenants.rate_limits import RateLimiter

LIMITS = CanaryLimits(min_requests=10)


@pytest.fixture
def accounts(tmp_path):
    made = Accounts(str(tmp_path / "tenants.db"))
    yield made
    made.close()


@pytest.fixture
def log_file(tmp_path):
    return tmp_path / "access.jsonl"


@pytest.fixture
def client(registry, backend, log_file):
    ingress = Ingress(ModelNames("base-model", registry), backend, Authenticator(None))
    return make_client(ingress, watchers=[AccessLog(log_file)])


def closed(registry, backend, ledger):
    return make_client(Ingress(ModelNames("base-model", registry), backend, Authenticator(ledger)))


def test_one_request_or_one_tenant_does_not_take_all_places():
    places = Admission(100)
    asks = "the request asks for 76 answers; this endpoint takes at most 75 of one caller at a time"
    assert places.refusal("acme", 76) == Failed(asks, 400)
    places.take("acme", 70)
    assert places.refusal("acme", 6).status == 429
    assert places.refusal("acme", 5) is None
    assert places.refusal("bolt", 30) is None
    places.take("bolt", 30)
    assert places.refusal("bolt", 1) == Failed("too many requests wait for this endpoint; try again", 429)
    places.give_back("bolt", 30)
    places.give_back("acme", 70)
    assert places.refusal("acme", 75) is None
    places.take("", 75)  # the base, asked by callers who are unknown
    assert places.refusal("", 1) == Failed("too many requests of the base wait for this endpoint; try again", 429)
    assert places.refusal("support@1", 25) is None


def test_what_fails_inside_is_a_500_in_openais_shape_and_in_the_log(client, backend, log_file):
    backend.text = None  # the shapes cannot join it
    answered = ask(client, "support")
    assert answered.status_code == 500
    assert answered.json()["error"]["type"] == "server_error"
    (line,) = (json.loads(line) for line in log_file.read_text().splitlines())
    assert line["status"] == 500
    assert line["request_id"] in answered.json()["error"]["message"]


def test_unknown_paths_and_methods_have_openais_shape(client):
    for response, asked in (
        (client.get("/v1/nothing"), "GET /v1/nothing"),
        (client.post("/v1/responses", json={}), "POST /v1/responses"),
        (client.get("/v1/chat/completions"), "GET /v1/chat/completions"),
    ):
        error = response.json()["error"]
        # A 404 of one user's unknown route would end the model for all of LiteLLM's proxy for a while.
        assert response.status_code == (400 if asked.startswith("POST") else 405 if "chat" in asked else 404)
        assert error["type"] in ("not_found_error", "invalid_request_error")
        assert (error["code"], error["param"]) == (None, None)  # a proxy would take it for a model that is gone
        assert error["message"] == f"there is no {asked} here"


@pytest.mark.parametrize("seconds", ["nan", "inf", "-1", "0", "soon"])
def test_a_timeout_is_a_number_of_seconds(client, seconds):
    body = {"model": "support", "messages": [{"role": "user", "content": "x"}]}
    refused = client.post("/v1/chat/completions", json=body, headers={"X-Request-Timeout": seconds})
    assert refused.status_code == 400
    assert "no number of seconds" in refused.json()["error"]["message"]


def test_deadlines_and_busy_replicas_end_no_canary(client, registry, backend):
    registry.set_canary("support@3", "prod", 50, LIMITS)
    for error in (Failed("the deadline", 504), Failed("nobody", 503)):
        backend.error = error
        for number in range(40):
            assert ask(client, "support", user=f"u{number}").status_code == error.status
    assert "prod" in registry.canaries("support")


def test_faults_that_the_stable_version_has_too_end_no_canary(client, registry, backend):
    registry.set_canary("support@3", "prod", 50, LIMITS)
    backend.error = Failed("the replica failed", 500)
    for number in range(60):
        ask(client, "support", user=f"u{number}")
    assert "prod" in registry.canaries("support")


def test_a_canary_whose_replicas_die_is_taken_back(client, registry, backend):
    registry.set_canary("support@3", "prod", 99.9, LIMITS)
    backend.deaths = 10**6
    for number in range(12):
        ask(client, "support", user=f"u{number}", stream=True)
    assert DIED.status == 502
    assert registry.canaries("support") == {}


def test_stop_texts_are_few_and_short(client):
    assert ask(client, "support", stop=["x"] * 16).status_code == 200
    for stop in (["x"] * 17, "x" * 257, ["x", "y" * 257]):
        refused = ask(client, "support", stop=stop)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"].startswith("stop")


def test_no_text_of_a_client_gets_into_the_log(client, backend, log_file):
    backend.error = Failed("message 0: 'my secret prompt' is not read here", 400)
    ask(client, "support")
    half = b'{"model": "\\ud83d", "messages": [{"role": "user", "content": "x"}]}'
    json_header = {"Content-Type": "application/json"}
    assert client.post("/v1/chat/completions", content=half, headers=json_header).status_code == 400
    lines = log_file.read_text().splitlines()
    assert len(lines) == 2
    assert "secret" not in log_file.read_text()
    backend.error = Failed("the replica failed", 500)
    ask(client, "support")
    assert json.loads(log_file.read_text().splitlines()[-1])["error"] == "the replica failed"


def test_messages_that_are_not_as_they_should_be_are_named():
    for message, part in (
        ({"role": "user", "content": ["my secret prompt"]}, "content of type 'str' is not read"),
        ({"role": "assistant", "tool_calls": 5}, "tool_calls must be a list"),
        ({"role": "assistant", "tool_calls": [5]}, "a tool call needs"),
    ):
        with pytest.raises(FtrayError, match=part):
            read_messages([message])


def test_a_caller_learns_neither_the_registrys_place_nor_what_others_have(registry, backend, accounts, tmp_path):
    registry.publish("globex-secret", tmp_path / "adapter", metadata={})
    client = closed(registry, backend, LocalLedger(RateLimiter(accounts)))
    client.headers["Authorization"] = f"Bearer {accounts.create(Tenant('acme', adapters=('globex', 'support')))}"
    for name in ("globex", "globex@3", "support@99", "support@beta"):
        said = ask(client, name).json()["error"]["message"]
        assert "globex-secret" not in said
        assert registry.location not in said
    assert "support has the versions 1, 2, 3" in ask(client, "support@99").json()["error"]["message"]
    assert "support has canary, prod as aliases" in ask(client, "support@beta").json()["error"]["message"]


def test_a_spent_budget_is_told_apart_from_a_busy_endpoint(registry, backend, accounts):
    client = closed(registry, backend, LocalLedger(RateLimiter(accounts)))
    client.headers["Authorization"] = f"Bearer {accounts.create(Tenant('acme', budget_tokens=1))}"
    assert ask(client, "support").status_code == 200
    refused = ask(client, "support")
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "insufficient_quota")
    assert "retry-after" not in refused.headers


def test_a_ledger_that_does_not_answer_refuses_and_says_so(registry, backend):
    class Away:
        async def admit(self, key):
            raise FtrayError("the database is away")

        identify = record = admit

    client = closed(registry, backend, Away())
    for response in (ask(client, "support"), client.get("/v1/models")):
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"
        assert "database" not in response.text


def test_thousands_of_names_are_listed_in_one_pass(registry, monkeypatch):
    names = ModelNames("base-model", registry)
    looks = []
    refresh = registry.refresh
    monkeypatch.setattr(registry, "refresh", lambda **how: looks.append(1) or refresh(**how))
    assert "support@prod" in names.names()
    assert len(looks) == 1
