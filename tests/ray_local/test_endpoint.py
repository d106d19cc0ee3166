"""The endpoint on Ray Serve, through the official openai client."""

import socket
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from listening import for_others, listening
from tiny import chat_rows, write_jsonl, write_peft_adapter, write_tiny_model

from ftray.artifacts.publish import publish_adapter
from ftray.config import parse_config
from ftray.errors import UserError
from ftray.registry import Registry
from ftray.serve.app import start_endpoint, stop_endpoint
from ftray.serve.checks import check_endpoint

NAMES = ["r4", "r8", "r16", "qv"]


@pytest.fixture(scope="module")
def registry(tmp_path_factory, adapters, tiny_model):
    root = tmp_path_factory.mktemp("serve")
    registry = Registry(str(root / "registry"))
    for name, directory in adapters.items():
        publish_adapter(registry, name, directory)
        registry.promote(f"{name}@1", "prod")
    other = write_tiny_model(root / "other", seed=1)
    stranger = write_peft_adapter(root / "stranger", other, rank=4, seed=5)
    registry.publish("stranger", stranger, metadata={"base_model": "other-model", "base_fingerprint": "0" * 64})
    registry.promote("stranger@1", "prod")
    return registry


@pytest.fixture(scope="module")
def config(registry, tiny_model, serve_port):
    text = (
        f"kind: serve\nbase_model: {tiny_model}\nport: {serve_port}\n"
        "engine: {max_sequences: 32, context_tokens: 256, kv_cache_tokens: 8192, max_waiting: 100}\n"
        f"adapters: {{registry: {registry.location}, preload: [r4@prod], host_budget: 1MiB}}\n"
        "limits: {body_timeout_s: 1}\n"
    )
    return parse_config(text, kind="serve", source="test")


@pytest.fixture(scope="module")
def url(ray_session, config):
    check_endpoint(config)
    yield start_endpoint(config)
    stop_endpoint()


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def ask(client, model, question, **more):
    settings = {"temperature": 0, "max_tokens": 12} | more
    return client.chat.completions.create(model=model, messages=[{"role": "user", "content": question}], **settings)


def test_32_concurrent_requests_over_4_adapters_equal_solo_answers(client):
    questions = [row["messages"][0]["content"] for row in chat_rows(32, seed=2)]
    solo = [ask(client, NAMES[i % 4], q).choices[0].message.content for i, q in enumerate(questions)]
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda item: ask(client, NAMES[item[0] % 4], item[1]), enumerate(questions)))
    assert [a.choices[0].message.content for a in answers] == solo
    assert [a.model for a in answers] == [f"{NAMES[i % 4]}@1" for i in range(32)]
    assert len({solo[i] for i in range(4)}) > 1


def test_streaming_gives_the_same_text_and_usage(client):
    whole = ask(client, "r8", "where is my card")
    chunks = list(ask(client, "r8", "where is my card", stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 0  # the prompt was computed for the first answer
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason


def test_completions_and_stop_and_seed(client, tiny_model):
    def complete(**more):
        return client.completions.create(model=str(tiny_model), prompt="hello", max_tokens=8, **more).choices[0]

    text = complete(temperature=0).text
    assert complete(temperature=0, stop=[text[3]]).text == text[: text.index(text[3])]
    assert complete(temperature=1, seed=3).text == complete(temperature=1, seed=3).text
    ids = client.completions.create(model=str(tiny_model), prompt=[7, 8, 9], max_tokens=2)
    assert ids.usage.prompt_tokens == 3


def test_models_lists_base_versions_and_aliases(client, tiny_model):
    names = {model.id for model in client.models.list()}
    assert names >= {str(tiny_model), "r4", "r4@1", "r4@prod"}


def test_an_unknown_model_is_404_with_the_near_names(client):
    with pytest.raises(openai.NotFoundError, match="r16@prod"):
        ask(client, "r61@prod", "hi")
    with pytest.raises(openai.NotFoundError, match=r"r16@9: .*there are|r16@9.*1"):
        ask(client, "r16@9", "hi")


def test_an_adapter_of_another_base_is_refused_and_harms_nobody(client):
    with pytest.raises(openai.BadRequestError, match=r"stranger@1: trained on other-model .* this endpoint serves"):
        ask(client, "stranger", "hi")
    assert ask(client, "r4", "hi").model == "r4@1"


def test_bad_requests_have_openais_shape(client, url):
    for stream in (False, True):  # before the stream has begun
        with pytest.raises(openai.BadRequestError, match="maximum context length is 256") as error:
            ask(client, "r4", "x" * 400, stream=stream)
        assert error.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="role 'bot'"):
        client.chat.completions.create(model="r4", messages=[{"role": "bot", "content": "x"}])
    assert httpx.post(f"{url}/v1/chat/completions", content=b"{").status_code == 400
    assert httpx.get(f"{url}/healthz").json() == {"status": "ok"}


def test_an_endpoint_for_this_machine_listens_for_nobody_else(client):
    """Its replicas, Ray and the pages of metrics, which tell tenants and models, too."""
    ask(client, "r4", "hi")
    found = listening()
    assert {"raylet", "gcs_server"} <= {process for process, _ in found}
    assert for_others(found) == set()


def test_a_client_that_sends_too_slowly_is_refused_and_holds_nobody_up(client, url):
    host, port = url.removeprefix("http://").split(":")
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
    head += "Content-Type: application/json\r\nContent-Length: 200\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=30) as slow:
        slow.sendall(head.encode() + b'{"model": ')
        assert ask(client, "r4", "hi").model == "r4@1"
        refused = b"".join(iter(lambda: slow.recv(4096), b""))
    assert refused.startswith(b"HTTP/1.1 408")
    assert b"took longer than 1 s to arrive" in refused


def test_another_port_than_that_of_the_running_serve_is_refused(url, config):
    with pytest.raises(
        UserError, match=f"port: {config.port + 1} is asked for, but Ray Serve runs .* port {config.port}"
    ):
        start_endpoint(config.model_copy(update={"port": config.port + 1}))
    assert httpx.get(f"{url}/healthz").json() == {"status": "ok"}


def test_a_new_version_is_served_without_a_restart(client, registry, adapters):
    publish_adapter(registry, "r4", adapters["r16"])
    before = ask(client, "r4", "where is the refund")
    registry.promote("r4@2", "prod")
    after = ask(client, "r4", "where is the refund")
    assert (before.model, after.model) == ("r4@1", "r4@2")
    assert after.choices[0].message.content == ask(client, "r16@1", "where is the refund").choices[0].message.content
    assert ask(client, "r4@1", "where is the refund").choices[0].message.content == before.choices[0].message.content
    registry.promote("r4@1", "prod")


def test_served_accuracy_equals_offline_accuracy(client, url, tiny_base, adapters, tmp_path):
    from ftray.config.data import DataConfig
    from ftray.config.serve import AdaptersConfig, EngineConfig
    from ftray.evaluate.endpoint import evaluate_endpoint
    from ftray.evaluate.offline import evaluate_offline
    from ftray.evaluate.task import answer_tokens, load_questions
    from ftray.infer.engines import load_adapter
    from ftray.infer.torch_engine.engine import TorchEngine
    from ftray.model.chat import ChatRenderer
    from ftray.model.hardware import choose_hardware

    data = DataConfig(train="-", eval=str(write_jsonl(tmp_path / "e.jsonl", chat_rows(12, seed=6))))
    questions = load_questions(data)
    engine = TorchEngine(tiny_base, choose_hardware(), EngineConfig(), AdaptersConfig(max_rank=64))
    load_adapter(engine, "r8@1", adapters["r8"])
    offline = evaluate_offline(engine, questions, data, adapter="r8@1", model="r8@1")
    tokens = answer_tokens(questions, ChatRenderer(engine.tokenizer))
    served = evaluate_endpoint(url, questions, model="r8@prod", max_tokens=tokens)
    assert [a.answer for a in served.answers] == [a.answer for a in offline.answers]
    with pytest.raises(UserError, match="not served here"):
        evaluate_endpoint(url, questions, model="ghost", max_tokens=4)


def test_a_port_in_use_is_told_before_ray_starts(url, config):
    with pytest.raises(UserError, match=f"port: {config.port} on 127.0.0.1 is in use"):
        check_endpoint(config)
