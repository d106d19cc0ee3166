"""Who gets in: an endpoint without keys for this machine alone, keys before bodies, tenants apart."""

import json

import pytest
from fake_endpoint import LocalLedger, ask, make_client

from ftray.config import ServeConfig
from ftray.serve.http.ingress import Ingress
from ftray.serve.replica.prompts import PromptReader
from ftray.serve.replica.replica import EngineReplica
from ftray.serve.routing.model_names import ModelNames
from ftray.serve.tenants.accounts import Accounts, Tenant
from ftray.serve.tenants.auth import Authenticator
from ftray.serve.tenants.rate_limits import RateLimiter


def config(**more) -> ServeConfig:
    return ServeConfig.model_validate({"kind": "serve", "base_model": "base-model", **more})


@pytest.fixture
def accounts(tmp_path):
    return Accounts(str(tmp_path / "tenants.db"))


@pytest.fixture
def endpoint(registry, backend, accounts):
    def make(*, keys: bool, settings=None, **limits):
        auth = Authenticator(LocalLedger(RateLimiter(accounts)) if keys else None)
        return make_client(Ingress(ModelNames("base-model", registry), backend, auth), settings=settings, **limits)

    return make


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.5", "gpu-node-3"])
def test_an_endpoint_for_other_machines_wants_keys_or_to_be_told(host):
    with pytest.raises(ValueError, match=r"anybody may ask; give tenants.database"):
        config(host=host)
    config(host=host, open=True)
    config(host=host, tenants={"database": "tenants.db"})
    for local in ("127.0.0.1", "localhost", "::1", "127.0.0.2"):
        config(host=local)


@pytest.mark.parametrize("path", ["/v1/models", "/ftray/status", "/", "/v1/chat/completions"])
def test_a_name_that_leads_here_is_not_this_machines_user(endpoint, path):
    client = endpoint(keys=False)

    def status(headers) -> int:
        if path.endswith("completions"):
            return ask(client, "support", headers=headers).status_code
        return client.get(path, headers=headers).status_code

    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example:8000"):
        assert status({"Host": host}) == 403
    for host in ("localhost", "127.0.0.1:8000", "[::1]:8000", "LOCALHOST:9"):
        assert status({"Host": host}) == 200
    assert status({"Origin": "https://evil.example"}) == 403
    assert status({"Origin": "null"}) == 403
    assert status({"Origin": "http://localhost:8000"}) == 200
    named = endpoint(keys=False, settings={"allowed_hosts": ["Box.lan"], "cors": {"origins": ["https://a.example"]}})
    assert named.get("/healthz", headers={"Host": "box.LAN:80"}).status_code == 200
    assert named.get("/healthz", headers={"Origin": "https://a.example"}).status_code == 200
    assert named.get("/healthz", headers={"Host": "evil.example"}).status_code == 403
    for other in (endpoint(keys=True), endpoint(keys=False, settings={"host": "0.0.0.0", "open": True})):
        assert other.get("/healthz", headers={"Host": "api.example.com"}).status_code == 200


def test_keys_are_looked_at_before_bodies(endpoint, accounts, backend):
    client = endpoint(keys=True, body_bytes="1KiB")
    key = accounts.create(Tenant("acme"))
    large = b"x" * 5000
    for headers in ({}, {"Authorization": "Bearer ftray-wrong"}):
        refused = client.post("/v1/chat/completions", content=large, headers=headers)
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
        assert refused.headers["www-authenticate"] == "Bearer"
    good = {"Authorization": f"Bearer {key}"}
    assert client.post("/v1/chat/completions", content=large, headers=good).status_code == 413
    assert ask(client, "base-model", headers=good).status_code == 200
    two = [("Authorization", "Bearer ftray-wrong"), ("Authorization", f"Bearer {key}")]
    assert client.post("/v1/chat/completions", content=b"{}", headers=two).status_code == 401
    assert len(backend.jobs) == 1


def test_headers_have_a_limit(endpoint):
    client = endpoint(keys=False)
    assert client.get("/healthz", headers={"X-Much": "x" * 60_000}).status_code == 200
    assert client.get("/healthz", headers={"X-Much": "x" * 70_000}).status_code == 431
    assert client.get("/healthz", headers={f"X-{i}": "y" * 20 for i in range(4000)}).status_code == 431


def test_a_tenants_prompts_are_its_own_in_the_cache(backend, endpoint, accounts):
    """The salt of the pages has the tenant, except where the config says that an adapter's prompts are everybody's."""
    client = endpoint(keys=True)
    for name in ("acme", "rival"):
        headers = {"Authorization": f"Bearer {accounts.create(Tenant(name))}"}
        ask(client, "support", headers=headers)
        ask(client, "support", headers=headers, cache_salt='["rival", ""]')

    class Replica:
        config = config()
        _shared = frozenset()

    salts = [EngineReplica._cache_salt(Replica, job) for job in backend.jobs]  # pyright: ignore[reportArgumentType]
    assert len(set(salts)) == 4
    assert [json.loads(salt)[0] for salt in salts] == ["acme", "acme", "rival", "rival"]
    Replica._shared = frozenset({"support"})
    shared = [EngineReplica._cache_salt(Replica, job) for job in backend.jobs]  # pyright: ignore[reportArgumentType]
    assert shared[0] == shared[2] == ""


def test_a_long_text_is_refused_before_it_is_tokenised(tiny_base):
    class Engine:
        vocab_size = 100
        num_calls = 0

        class tokenizer:
            @staticmethod
            def get_vocab():
                return {"a": 0, "abcd": 1}

            def __new__(cls, text, **_):
                Engine.num_calls += 1
                return {"input_ids": [0] * len(text)}

            all_special_tokens = ()

            chat_template = None

    reader = PromptReader.__new__(PromptReader)
    reader._engine, reader._context_tokens, reader._longest_token = Engine, 10, 4  # pyright: ignore
    assert len(reader.text("a" * 43, key="prompt")) == 43  # up to there it may fit, for all that is known
    with pytest.raises(Exception, match="maximum context length is 10 tokens") as error:
        reader.text("a" * 44, key="prompt")
    with pytest.raises(Exception, match="maximum context length is 10 tokens"):
        reader.chat([{"role": "user", "content": "a" * 30}, {"role": "user", "content": "a" * 30}], ())
    assert error.value.code == "context_length_exceeded"
    assert Engine.num_calls == 1


def test_a_new_tenant_has_the_base_alone_unless_told(tmp_path, capsys):
    from ftray.cli.main import main

    database = str(tmp_path / "t.db")
    for arguments in (["noadp"], ["every", "--adapters", "all"]):
        with pytest.raises(SystemExit, match="0"):
            main(["tenants", "create", *arguments, "--database", database])
    assert "noadp: the base only" in capsys.readouterr().err
    tenants = {tenant.name: tenant for tenant in Accounts(database).tenants()}
    assert [tenants["noadp"].may_use(name) for name in (None, "support@1")] == [True, False]
    assert tenants["every"].may_use("support@1")
