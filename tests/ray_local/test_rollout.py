"""The endpoint with two replicas and tenants: flips under load, canaries, a replica that dies, a ledger that agrees."""

import json
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

from ftray.artifacts.publish import publish_adapter
from ftray.cli import rollout
from ftray.cli.main import main
from ftray.config import parse_config
from ftray.registry import CanaryLimits, Registry
from ftray.serve.app import APP_NAME, ray_log_directory, start_endpoint, stop_endpoint
from ftray.serve.tenants.accounts import Accounts, Tenant

KINDS = ["r4", "r8", "r16", "qv"]  # version N holds the weights of KINDS[(N - 1) % 4]
QUESTION = "where is the refund"
FLIPS, CLIENTS, LEAVERS = 200, 32, 64


@pytest.fixture(scope="module")
def registry(tmp_path_factory, adapters):
    registry = Registry(str(tmp_path_factory.mktemp("rollout") / "registry"))
    for kind in KINDS:
        publish_adapter(registry, "support", adapters[kind])
    registry.promote("support@1", "prod")
    publish_adapter(registry, "legal", adapters["r4"])
    registry.promote("legal@1", "prod")
    return registry


@pytest.fixture(scope="module")
def accounts(tmp_path_factory):
    return Accounts(str(tmp_path_factory.mktemp("accounts") / "tenants.db"))


@pytest.fixture(scope="module")
def keys(accounts):
    acme, bolt = Tenant("acme"), Tenant("bolt", adapters=("support",), requests_per_minute=5)
    return {t.name: accounts.create(t) for t in (acme, bolt, Tenant("boss", is_admin=True))}


@pytest.fixture(scope="module")
def config(registry, accounts, tiny_model, serve_port):
    return parse_config(
        f"kind: serve\nbase_model: {tiny_model}\nserved_name: tiny\nport: {serve_port}\n"
        "engine: {max_sequences: 16, context_tokens: 1024, kv_cache_tokens: 16384}\n"
        f"adapters: {{registry: {registry.location}, preload: [support@prod]}}\n"
        "replicas: {min: 2, max: 2, cpus_each: 1}\n"
        f"tenants: {{database: {accounts.database.location}}}\n",
        kind="serve",
        source="test",
    )


@pytest.fixture(scope="module")
def url(ray_session, config):
    yield start_endpoint(config)
    stop_endpoint()


@pytest.fixture(scope="module")
def client(url, keys):
    return openai.OpenAI(base_url=f"{url}/v1", api_key=keys["acme"], max_retries=0)


def ask(client, model="support", **more):
    messages = [{"role": "user", "content": QUESTION}]
    return client.chat.completions.create(model=model, messages=messages, temperature=0, **{"max_tokens": 8} | more)


@pytest.fixture(scope="module")
def expected(client) -> list[str]:
    """The answer of each of the four weights."""
    found = [ask(client, f"support@{number}").choices[0].message.content for number in (1, 2, 3, 4)]
    assert len(set(found)) == 4
    return found


def test_only_an_admin_warms_and_a_promoted_version_is_loaded_everywhere(url, keys, registry, monkeypatch, capsys):
    monkeypatch.setenv(rollout.API_KEY, keys["acme"])
    words = ["adapters", "promote", "support@2", "beta", "--registry", registry.location, "--endpoint", url]
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert "wants an admin key" in capsys.readouterr().err
    assert registry.aliases("support") == {"prod": 1}
    monkeypatch.setenv(rollout.API_KEY, keys["boss"])
    with pytest.raises(SystemExit, match="0"):
        main(words)
    assert "support@2 is loaded on 2 replicas" in capsys.readouterr().out
    assert registry.aliases("support") == {"beta": 2, "prod": 1}


def test_flips_and_publications_under_load_fail_nothing_and_misroute_nothing(client, registry, adapters, expected):
    stop = threading.Event()
    answered: Counter[str] = Counter()
    wrong: list[str] = []

    def load() -> None:
        while not stop.is_set():
            answer = ask(client)
            number = int(answer.model.removeprefix("support@"))
            answered[answer.model] += 1
            if answer.choices[0].message.content != expected[(number - 1) % 4]:
                wrong.append(answer.model)

    with ThreadPoolExecutor(CLIENTS) as pool:
        running = [pool.submit(load) for _ in range(CLIENTS)]
        try:
            flip, until = 0, time.monotonic() + 120
            # A slow machine answers few questions between two flips: it gets more of them.
            while flip < FLIPS or (len(answered) <= 10 and time.monotonic() < until):
                if flip % 10 == 9:
                    publish_adapter(registry, "support", adapters[KINDS[len(registry.versions("support")) % 4]])
                versions = registry.versions("support")
                registry.promote(f"support@{versions[-1 - flip % 4]}", "prod")
                flip += 1
                time.sleep(0.03)
        finally:
            stop.set()
        for task in running:
            task.result()  # raises what failed
    assert wrong == []
    assert len(answered) > 10
    now = str(registry.resolve("support"))
    assert ask(client).model == now


def test_a_canary_over_http_is_sticky_and_ends_by_itself(url, client, registry, expected, tmp_path):
    registry.promote("support@1", "prod")
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in registry.directory(registry.get("support@2")).iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    (broken / "adapter_model.safetensors").write_bytes(b"not weights")
    version = registry.publish("support", broken, metadata={})
    registry.set_canary(str(version), "prod", 50, CanaryLimits(min_requests=5))
    answers = [ask(client, user=f"user-{i}") for i in range(30)]
    assert {a.model for a in answers} == {"support@1"}  # nobody saw it
    assert {a.choices[0].message.content for a in answers} == {expected[0]}
    assert registry.canaries("support") == {}
    assert "answers failed" in registry.history("support")[-1]["reason"]


def engine_replicas() -> list[str]:
    named = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
    return [name for name in named if f"{APP_NAME}#engine" in name]


def test_a_replica_that_is_killed_loses_no_whole_answer(client, expected):
    assert len(engine_replicas()) == 2
    with ThreadPoolExecutor(16) as pool:
        running = [pool.submit(ask, client, "support@1", max_tokens=40) for _ in range(64)]
        time.sleep(0.3)
        ray.kill(ray.get_actor(engine_replicas()[0], namespace="serve"))
        texts = {task.result().choices[0].message.content for task in running}
    assert len(texts) == 1
    assert texts.pop().startswith(expected[0])


def test_a_redeployment_under_load_fails_nothing(client, config, expected):
    before = set(engine_replicas())
    stop = threading.Event()
    answers: list[str] = []

    def load() -> None:
        while not stop.wait(0.2):  # two cores: the new replicas have to start beside it
            answers.append(ask(client, "support@1").choices[0].message.content)

    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(load) for _ in range(4)]
        try:
            engine = config.engine.model_copy(update={"max_sequences": 8})
            start_endpoint(config.model_copy(update={"engine": engine}))
        finally:
            stop.set()
        for task in running:
            task.result()
    assert set(answers) == {expected[0]}
    assert len(answers) > 10
    assert not before & set(engine_replicas())


def test_replicas_come_and_go_with_the_load_and_nothing_fails(client, config, expected):
    replicas = config.replicas.model_copy(update={"min": 1, "upscale_delay_s": 1, "downscale_delay_s": 2})
    engine = config.engine.model_copy(update={"max_sequences": 4})
    start_endpoint(config.model_copy(update={"replicas": replicas, "engine": engine}))
    busy, stop = threading.Event(), threading.Event()
    answers: list[str] = []

    def load(*, until: threading.Event) -> None:
        while not until.is_set():
            answers.append(ask(client, "support@1").choices[0].message.content)

    with ThreadPoolExecutor(24) as pool:
        running = [pool.submit(load, until=busy) for _ in range(22)] + [pool.submit(load, until=stop) for _ in range(2)]
        try:
            wait_for_replicas(1)  # the redeployment's others have gone
            wait_for_replicas(2)
            busy.set()
            wait_for_replicas(1)
        finally:
            busy.set()
            stop.set()
        for task in running:
            task.result()  # raises what failed
    assert set(answers) == {expected[0]}


def wait_for_replicas(count: int, *, patience_s: float = 60) -> None:
    began = time.monotonic()
    while len(engine_replicas()) != count:
        assert time.monotonic() - began < patience_s, f"{engine_replicas()}, not {count}"
        time.sleep(0.1)


def test_limits_and_allow_lists_over_http(url, keys):
    bolt = openai.OpenAI(base_url=f"{url}/v1", api_key=keys["bolt"], max_retries=0)
    assert {model.id.partition("@")[0] for model in bolt.models.list()} == {"tiny", "support"}
    with pytest.raises(openai.NotFoundError, match="no adapter of that name"):
        ask(bolt, "legal")
    for _ in range(4):
        ask(bolt, "support@1")
    with pytest.raises(openai.RateLimitError) as refused:
        ask(bolt, "support@1")
    assert 0 < int(refused.value.response.headers["retry-after"]) <= 12
    with pytest.raises(openai.AuthenticationError):
        ask(openai.OpenAI(base_url=f"{url}/v1", api_key="ftray-wrong", max_retries=0))


def test_clients_that_leave_free_their_places_and_are_counted(url, keys, accounts, client):
    """Many: what an answer still has to tell the ledger must not be cancelled with the request."""
    body = {"model": "legal@1", "messages": [{"role": "user", "content": "x"}], "max_tokens": 900, "stream": True}
    headers = {"Authorization": f"Bearer {keys['acme']}"}
    body["ignore_eos"] = True

    def leave(number: int) -> int:
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, headers=headers) as response:
            assert response.status_code == 200
            return sum(1 for _, line in zip(range(2 + number % 12), response.iter_lines(), strict=False) if line)

    with ThreadPoolExecutor(8) as pool:
        seen = sum(pool.map(leave, range(LEAVERS)))
    end = time.monotonic() + 20
    reported = {"requests": 0, "cut": 0, "completion_tokens": 0}
    while reported["requests"] < LEAVERS and time.monotonic() < end:
        time.sleep(0.2)
        reported = next((row for row in accounts.usage(tenant="acme") if row["model"] == "legal@1"), reported)
    assert (reported["requests"], reported["cut"]) == (LEAVERS, LEAVERS)
    assert seen <= reported["completion_tokens"] < 900 * LEAVERS
    in_use = httpx.post(
        f"{url}/ftray/in_use", json={"model": "legal@1"}, headers={"Authorization": f"Bearer {keys['boss']}"}
    )
    assert in_use.json() == {"model": "legal@1", "requests": 0}


def test_the_ledger_equals_what_clients_count(url, accounts):
    key = accounts.create(Tenant("counted"))
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
    counted: Counter[str] = Counter()
    lock = threading.Lock()

    def use(number: int) -> None:
        model = f"support@{1 + number % 3}"
        if number % 2:
            usage = ask(client, model, n=1 + number % 3).usage
        else:
            chunks = list(ask(client, model, stream=True, stream_options={"include_usage": True}))
            usage = chunks[-1].usage
        with lock:
            counted[f"{model} requests"] += 1
            counted[f"{model} prompt"] += usage.prompt_tokens
            counted[f"{model} completion"] += usage.completion_tokens

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(use, range(90)))
    for row in accounts.usage(tenant="counted"):
        model = row["model"]
        assert row["requests"] == counted[f"{model} requests"]
        assert row["prompt_tokens"] == counted[f"{model} prompt"]
        assert row["completion_tokens"] == counted[f"{model} completion"]
    assert sum(row["requests"] for row in accounts.usage(tenant="counted")) == 90


def test_usage_as_a_table_and_as_csv(accounts, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["usage", "--database", accounts.database.location, "--tenant", "counted", "--csv"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("tenant,model,requests")
    assert len(lines) == 4
    assert json.dumps(accounts.usage(tenant="counted")[0]["completion_tokens"]) in lines[1]


def test_prometheus_metrics_equal_the_ledger(url, accounts):
    port = next(node["MetricsExportPort"] for node in ray.nodes() if node["Alive"])
    wanted = {row["model"]: row["completion_tokens"] for row in accounts.usage(tenant="counted")}
    end = time.monotonic() + 30
    reported: dict[str, float] = {}
    while reported != wanted and time.monotonic() < end:
        time.sleep(0.5)
        reported = {}
        for family in text_string_to_metric_families(httpx.get(f"http://127.0.0.1:{port}/metrics").text):
            for sample in family.samples:
                if sample.name == "ray_ftray_completion_tokens_total" and sample.labels["tenant"] == "counted":
                    reported[sample.labels["model"]] = reported.get(sample.labels["model"], 0) + sample.value
    assert reported == wanted


def test_the_access_log_lies_where_ray_keeps_its_logs(accounts):
    logs = ray_log_directory().glob("ftray-access-*.jsonl")
    lines = [json.loads(line) for path in logs for line in path.read_text().splitlines()]
    counted = [line for line in lines if line.get("tenant") == "counted"]
    assert len(counted) == 90
    rows = accounts.usage(tenant="counted")
    assert sum(line["completion_tokens"] for line in counted) == sum(row["completion_tokens"] for row in rows)
