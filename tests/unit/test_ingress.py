"""The ingress over a fake backend: canaries, replicas that die, deadlines, keys, limits, the ledger."""

import threading
import time
import uuid

import pytest
from fake_endpoint import LocalLedger, ask, make_client

from ftray.errors import ConflictError, FtrayError, NotFoundError, UserError
from ftray.registry import CanaryLimits, Registry
from ftray.serve.http.ingress import Ingress
from ftray.serve.protocol import Failed
from ftray.serve.routing.canary import CanaryWatch, is_chosen
from ftray.serve.routing.model_names import ModelNames
from ftray.serve.tenants.accounts import Accounts, Tenant, Usage
from ftray.serve.tenants.auth import Authenticator
from ftray.serve.tenants.rate_limits import RateLimiter, Refusal

LIMITS = CanaryLimits(min_requests=10)


@pytest.fixture(scope="module")
def postgresql(tmp_path_factory):
    """A real server, on a socket of its own; its URL for a database of a given name."""
    pgserver = pytest.importorskip("pgserver", reason="has no wheel for this Python")
    server = pgserver.get_server(tmp_path_factory.mktemp("postgresql"), cleanup_mode="stop")

    def make(name: str) -> str:
        server.psql(f"CREATE DATABASE {name};")
        return server.get_uri(name)

    yield make
    server.cleanup()


@pytest.fixture(params=["sqlite", "postgresql"])
def accounts(request, tmp_path):
    if request.param == "sqlite":
        made = Accounts(str(tmp_path / "tenants.db"))
    else:
        made = Accounts(request.getfixturevalue("postgresql")(f"t{uuid.uuid4().hex[:12]}"))
    yield made
    made.close()


@pytest.fixture
def names(registry):
    return ModelNames("base-model", registry)


@pytest.fixture
def open_client(names, backend):
    return make_client(Ingress(names, backend, Authenticator(None)))


@pytest.fixture
def closed_client(names, backend, accounts):
    return make_client(Ingress(names, backend, Authenticator(LocalLedger(RateLimiter(accounts)))))


def answered_by(client, count: int, **more) -> list[str]:
    """By the session of each caller."""
    sessions = ({"X-Session-Id": f"session-{i}"} for i in range(count))
    return [ask(client, "support", headers=headers, **more).json()["model"] for headers in sessions]


# -- canaries ------------------------------------------------------------------------------------------------------


def test_a_canary_gets_its_share_and_each_session_the_same_version(open_client, registry):
    registry.set_canary("support@3", "prod", 30, LIMITS)
    first = answered_by(open_client, 200)
    assert first == answered_by(open_client, 200)
    assert 40 <= first.count("support@3") <= 80
    registry.set_canary("support@3", "prod", 60, LIMITS)
    wider = answered_by(open_client, 200)
    assert all(b == "support@3" for a, b in zip(first, wider, strict=True) if a == "support@3")
    registry.promote("support@3", "prod")
    assert set(answered_by(open_client, 20)) == {"support@3"}
    assert registry.canaries("support") == {}


def test_a_canary_that_cannot_be_loaded_harms_nobody_and_is_taken_back(open_client, registry, backend):
    registry.set_canary("support@3", "prod", 50, LIMITS)
    backend.broken = {"support@3"}
    answered = {ask(open_client, "support").json()["model"] for _ in range(60)}
    assert answered == {"support@2"}  # every request is answered all the same
    assert [job.adapter for job in backend.jobs].count("support@3") == 10  # then it was taken back
    ended = registry.history("support")[-1]
    assert (ended["type"], ended["percent"]) == ("canary", 0)
    assert "100% of 10 answers failed, against 0%" in ended["reason"]


def test_no_caller_chooses_on_which_side_of_a_canary_it_counts(open_client, registry, backend):
    registry.set_canary("support@3", "prod", 50, LIMITS)
    side = {name: ask(open_client, "support", headers={"X-Session-Id": name}).json()["model"] for name in "abcdefgh"}
    canarys = next(name for name, model in side.items() if model == "support@3")
    backend.broken = {"support@3"}
    for _ in range(40):  # a caller who has found out
        ask(open_client, "support", headers={"X-Session-Id": canarys})
    assert "prod" in registry.canaries("support")
    by_user = {ask(open_client, "support", user="a").json()["model"] for _ in range(40)}
    assert by_user == {"support@2"}
    assert registry.canaries("support") == {}  # those count: chance sent them


def test_what_a_request_causes_ends_no_canary(open_client, registry, backend):
    registry.set_canary("support@3", "prod", 50, LIMITS)
    backend.error = Failed("response_format: beyond the parser's limits", 400)
    for _ in range(60):
        assert ask(open_client, "support").status_code == 400
    assert "prod" in registry.canaries("support")


def test_streams_of_a_broken_canary_go_to_the_stable_version(open_client, registry, backend):
    registry.set_canary("support@3", "prod", 99.9, LIMITS)
    backend.broken = {"support@3"}
    response = ask(open_client, "support", user="x", stream=True)
    assert response.status_code == 200
    assert "support@2" in response.text
    assert "support@3" not in response.text


def test_a_slow_canary_is_taken_back_and_a_good_one_stays(registry):
    registry.set_canary("support@3", "prod", 50, LIMITS)
    canary = registry.canaries("support")["prod"]
    for usual, seconds, verdict in (
        (0.1, 0.25, "first token took 250 ms, against 100 ms"),
        (0.1, 0.15, None),
        (0.01, 0.04, None),  # four times, and nobody would notice
    ):
        watch = CanaryWatch(canary)
        for _ in range(10):
            watch.note(is_canary=False, failed=False, first_token_s=usual)
            watch.note(is_canary=True, failed=False, first_token_s=seconds)
        assert (verdict in watch.verdict()) if verdict else watch.verdict() is None


def test_errors_that_the_stable_version_has_too_do_not_end_a_canary(registry):
    registry.set_canary("support@3", "prod", 50, LIMITS)
    watch = CanaryWatch(registry.canaries("support")["prod"])
    for number in range(40):
        watch.note(is_canary=number % 2 == 0, failed=number % 10 < 2, first_token_s=None)
    assert watch.verdict() is None


def test_two_ingresses_take_a_canary_back_once(registry):
    registry.set_canary("support@3", "prod", 50, LIMITS)
    canary = registry.canaries("support")["prod"]
    registry.end_canary("support", "prod", reason="slow", seq=canary.seq)
    with pytest.raises(ConflictError):
        Registry(registry.location).end_canary("support", "prod", reason="slow", seq=canary.seq)


def test_without_a_caller_the_choice_is_by_chance(registry):
    registry.set_canary("support@3", "prod", 50, LIMITS)
    canary = registry.canaries("support")["prod"]
    chosen = [is_chosen(canary, alias="support@prod", session=None) for _ in range(400)]
    assert 140 < sum(chosen) < 260


# -- faults and deadlines --------------------------------------------------------------------------------------------


def test_a_replica_that_dies_is_tried_again_where_nothing_was_shown(open_client, backend):
    backend.deaths = 2
    assert ask(open_client, "support").json()["usage"]["completion_tokens"] == 2
    assert len(backend.jobs) == 3
    backend.deaths = 3
    response = ask(open_client, "support")
    assert response.status_code == 502
    assert "died" in response.json()["error"]["message"]


def test_a_replica_that_dies_in_a_stream_is_a_clean_error_event(open_client, backend):
    backend.deaths = 1
    lines = [line for line in ask(open_client, "support", stream=True).text.splitlines() if line]
    assert '"I am "' in lines[0]
    assert '"error": {"message": "the replica died"' in lines[-1]
    assert "[DONE]" not in "".join(lines)


def test_deadlines(open_client, backend):
    backend.pause_s = 5

    def post(**more):
        body = {"model": "support", "messages": [{"role": "user", "content": "hi"}], **more}
        return open_client.post("/v1/chat/completions", json=body, headers={"X-Request-Timeout": "0.2"})

    began = time.monotonic()
    assert post().status_code == 504
    assert "deadline has passed" in post(stream=True).text
    assert time.monotonic() - began < 4
    bad = open_client.post(
        "/v1/completions", json={"model": "support", "prompt": "x"}, headers={"X-Request-Timeout": "soon"}
    )
    assert bad.status_code == 400


def test_bodies_that_are_too_large_are_refused(names, backend):
    client = make_client(Ingress(names, backend, Authenticator(None)), body_bytes="1000B")
    assert ask(client, "support").status_code == 200
    assert ask(client, "support", user="x" * 2000).status_code == 413

    def without_end():
        for _ in range(100):
            yield b"x" * 100

    assert client.post("/v1/chat/completions", content=without_end()).status_code == 413
    assert backend.jobs[1:] == []


# -- tenants ---------------------------------------------------------------------------------------------------------


def as_tenant(client, key: str | None, model: str, **more):
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}], **more}
    return client.post("/v1/chat/completions", json=body, headers=headers)


def test_no_key_and_wrong_keys_are_refused(closed_client, accounts, backend):
    key = accounts.create(Tenant("acme"))
    assert as_tenant(closed_client, key, "support").status_code == 200
    for wrong in (None, "nonsense", key[:-1], key + "x", key.upper()):
        response = as_tenant(closed_client, wrong, "support")
        assert response.status_code == 401
        assert response.json()["error"]["type"] == "authentication_error"
    assert closed_client.get("/v1/models").status_code == 401
    assert len(backend.jobs) == 1


def test_a_tenant_sees_and_uses_its_own_adapters_only(closed_client, accounts, registry, tmp_path):
    registry.publish("legal", tmp_path / "adapter", metadata={})
    registry.promote("legal@1", "prod")
    key = accounts.create(Tenant("acme", adapters=("support",)))
    assert as_tenant(closed_client, key, "base-model").status_code == 200
    assert as_tenant(closed_client, key, "support@3").status_code == 200
    for name in ("legal", "legal@1", "legal@9", "nothing"):
        refused = as_tenant(closed_client, key, name)
        assert refused.status_code == 404
        said = refused.json()["error"]["message"].replace(repr(name), "")
        assert "no adapter of that name" in said  # as for one that does not exist
        assert "legal" not in said
    listed = closed_client.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).json()["data"]
    assert {entry["id"].partition("@")[0] for entry in listed} == {"base-model", "support"}


def test_usage_is_what_was_answered(closed_client, accounts, backend):
    key, other = accounts.create(Tenant("acme")), accounts.create(Tenant("bolt"))
    for i in range(6):
        as_tenant(closed_client, key, "support", stream=i % 2 == 0)
    as_tenant(closed_client, other, "base-model", n=2)
    backend.deaths = 1
    as_tenant(closed_client, key, "support@1", stream=True)
    as_tenant(closed_client, key, "nothing")  # not found: nothing to count
    rows = {(row["tenant"], row["model"]): row for row in accounts.usage()}
    counted = rows["acme", "support@2"]
    assert (counted["requests"], counted["cut"]) == (6, 0)
    assert (counted["prompt_tokens"], counted["completion_tokens"]) == (18, 12)
    assert rows["bolt", "base-model"]["completion_tokens"] == 4
    assert (rows["acme", "support@1"]["cut"], rows["acme", "support@1"]["completion_tokens"]) == (1, 1)
    assert len(rows) == 3


def test_a_record_that_comes_twice_counts_once(accounts):
    usage = Usage("r1", "acme", "support@1", 3, 0, 2, "whole", 1.0)
    accounts.record([usage, usage])
    accounts.record([usage])
    assert accounts.usage()[0]["requests"] == 1
    assert accounts.spent_tokens("acme") == 5


def test_records_of_several_writers_all_count(accounts):
    def write(writer: int) -> None:
        own = Accounts(accounts.database.location)
        for number in range(40):
            own.record([Usage(f"{number // 2}-{writer % 2}", "acme", "support@1", 3, 1, 2, "whole", 1.0)])
        own.close()

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (row,) = accounts.usage(tenant="acme", since=0.5, until=1.5)
    assert (row["requests"], row["prompt_tokens"], row["cached_tokens"], row["completion_tokens"]) == (40, 120, 40, 80)
    assert accounts.usage(since=1.5) == []


def test_what_cannot_be_is_refused(accounts, tmp_path):
    accounts.create(Tenant("acme"))
    with pytest.raises(ConflictError, match="there is such a tenant"):
        accounts.create(Tenant("acme"))
    with pytest.raises(UserError, match="a tenant's name is"):
        accounts.create(Tenant("../x"))
    with pytest.raises(UserError, match="requests_per_minute: -1 must be greater than 0"):
        accounts.change("acme", {"requests_per_minute": -1})
    with pytest.raises(NotFoundError, match="nobody: no such tenant; there are acme"):
        accounts.rotate("nobody", grace_s=0)
    with pytest.raises(UserError, match=r"tenants\.database"):
        Accounts("nosuchkind://host/x")
    with pytest.raises(
        FtrayError, match=r"tenants\.database: postgresql://me:\*\*\*@127\.0\.0\.1:1/x cannot be opened"
    ):
        Accounts("postgresql://me:secret@127.0.0.1:1/x")


def test_limits(accounts):
    now = 0.0
    keeper = RateLimiter(accounts, clock=lambda: now)
    key = accounts.create(Tenant("acme", requests_per_minute=3, tokens_per_minute=100, budget_tokens=500))

    def spend(name: str, tokens: int) -> None:
        keeper.record(Usage(name, "acme", "m", tokens, 0, 0, "whole", now))

    assert [isinstance(keeper.admit(key), Tenant) for _ in range(4)] == [True, True, True, False]
    refusal = keeper.admit(key)
    assert isinstance(refusal, Refusal)
    assert (refusal.status, refusal.retry_after_s) == (429, 20)
    now = 21.0
    assert isinstance(keeper.admit(key), Tenant)
    spend("r1", 150)  # over the rate: 50 in debt
    now = 50.0
    refused = keeper.admit(key)
    assert isinstance(refused, Refusal)
    assert "100 tokens a minute" in refused.message
    now = 200.0
    assert isinstance(keeper.admit(key), Tenant)
    spend("r2", 350)
    now = 1000.0
    refused = keeper.admit(key)
    assert isinstance(refused, Refusal)
    assert "budget of 500 tokens is spent" in refused.message
    accounts.change("acme", {"budget_tokens": 1000})
    now = 1003.0  # a key is believed for two seconds
    assert isinstance(keeper.admit(key), Tenant)


def test_a_refusal_says_when_to_come_back(closed_client, accounts):
    key = accounts.create(Tenant("acme", requests_per_minute=1))
    assert as_tenant(closed_client, key, "support").status_code == 200
    response = as_tenant(closed_client, key, "support")
    assert response.status_code == 429
    assert 50 < int(response.headers["retry-after"]) <= 60


def test_rotated_and_revoked_keys(accounts):
    first = accounts.create(Tenant("acme"))
    second = accounts.rotate("acme", grace_s=3600)
    assert accounts.tenant_of_key(first) == accounts.tenant_of_key(second) == Tenant("acme")
    third = accounts.rotate("acme", grace_s=0)
    assert accounts.tenant_of_key(second) is None
    assert accounts.revoke("acme", hint=third[-4:]) == 1
    assert accounts.tenant_of_key(third) is None
    assert accounts.keys("acme") == []


def test_keys_are_nowhere_in_the_database(tmp_path):
    key = Accounts(str(tmp_path / "tenants.db")).create(Tenant("acme"))
    written = b"".join(path.read_bytes() for path in tmp_path.glob("tenants.db*"))
    assert b"acme" in written
    assert key.encode() not in written
    assert key.removeprefix("ftray-")[:20].encode() not in written


def test_a_route_is_a_function_of_the_services(names, backend):
    """A toy one: a file of its own and an entry in the list of routes."""
    from fastapi import APIRouter

    from ftray.serve.http.routes import ROUTES
    from ftray.serve.http.services import Context, Services

    def count_routes(services: Services) -> APIRouter:
        router = APIRouter()

        @router.get("/count")
        async def count(context: Context) -> dict:
            await services.ingress.auth.tenant(context)
            return {"models": len(services.ingress.names.names()), "path": context.path}

        return router

    ingress = Ingress(names, backend, Authenticator(None))
    client = make_client(ingress, routes=[*ROUTES, count_routes])
    assert client.get("/count").json() == {"models": len(ingress.names.names()), "path": "/count"}
    assert client.get("/healthz").json() == {"status": "ok"}
    assert make_client(ingress).get("/count").status_code == 404
