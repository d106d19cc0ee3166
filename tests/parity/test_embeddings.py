"""Embeddings of a base that says how it pools, with and without an adapter, against transformers and peft."""

import asyncio
import base64
import json

import numpy as np
import pytest
import torch
from tiny import write_peft_adapter, write_tiny_model
from transformers import AutoModelForCausalLM

from ftray.config import parse_config
from ftray.errors import UserError
from ftray.infer.torch_engine.pooling import embedding_of
from ftray.model.chat import ChatRenderer
from ftray.registry import Registry
from ftray.serve.http.context import RequestContext
from ftray.serve.http.embeddings import EmbeddingRequest, Embeddings
from ftray.serve.protocol import EmbedJob, PlainText, TokenizeJob
from ftray.serve.replica.replica import EngineReplica
from ftray.serve.routing.model_names import ModelNames
from ftray.serve.tenants.auth import Authenticator

TEXTS = ["where is my refund", "hello", "the order has not come yet, and I would like to know why"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = write_tiny_model(tmp_path_factory.mktemp("embedding") / "base")
    (directory / "1_Pooling").mkdir()
    return directory


def pool(base, mode: str, *, normalize: bool, replica=None) -> None:
    (base / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{mode}": True}))
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    modules = [{"type": f"sentence_transformers.models.{kind}"} for kind in kinds]
    (base / "modules.json").write_text(json.dumps(modules))
    if replica is not None:  # an engine reads them once
        vars(replica.engine).pop("_embedding", None)


@pytest.fixture(scope="module")
def replica(base, tmp_path_factory):
    registry = Registry(str(tmp_path_factory.mktemp("embedding") / "registry"))
    adapter = write_peft_adapter(tmp_path_factory.mktemp("embedding") / "a", base, rank=8, seed=3)
    registry.publish("search", adapter, metadata={})
    text = (
        f"kind: serve\nbase_model: {base}\nadapters: {{registry: {registry.location}}}\n"
        "engine: {context_tokens: 128, kv_cache_tokens: 1024, max_prefill_tokens: 24}\n"
    )
    replica = EngineReplica(parse_config(text, kind="serve", source="test"))
    replica.adapter_directory = adapter
    yield replica
    replica.close()


def expected(replica, base, mode: str, *, adapter: bool, normalize: bool) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, replica.adapter_directory)
    found = []
    for text in TEXTS:
        ids = torch.tensor([replica.engine.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            hidden = model(ids, output_hidden_states=True).hidden_states[-1][0]
        found.append({"lasttoken": hidden[-1], "mean_tokens": hidden.mean(0), "cls_token": hidden[0]}[mode])
    vectors = torch.stack(found)
    return torch.nn.functional.normalize(vectors, dim=-1) if normalize else vectors


@pytest.mark.parametrize("adapter", [None, "search@1"])
@pytest.mark.parametrize(("mode", "normalize"), [("lasttoken", True), ("mean_tokens", False), ("cls_token", False)])
def test_vectors_are_transformers(replica, base, mode, normalize, adapter):
    pool(base, mode, normalize=normalize, replica=replica)
    found = asyncio.run(replica.answer(EmbedJob(TEXTS, adapter)))
    vectors = torch.tensor(found.vectors)
    torch.testing.assert_close(
        vectors, expected(replica, base, mode, adapter=bool(adapter), normalize=normalize), atol=2e-5, rtol=1e-4
    )
    other = expected(replica, base, mode, adapter=not adapter, normalize=normalize)
    assert not torch.allclose(vectors, other, atol=1e-3)  # the comparison would see another model
    assert found.prompt_tokens == sum(len(replica.engine.tokenizer(text)["input_ids"]) for text in TEXTS)


def test_fewer_dimensions_are_the_first_ones_normalised(replica, base):
    pool(base, "lasttoken", normalize=True, replica=replica)
    whole = torch.tensor(asyncio.run(replica.answer(EmbedJob(TEXTS, None))).vectors)
    short = torch.tensor(asyncio.run(replica.answer(EmbedJob(TEXTS, None, 8))).vectors)
    torch.testing.assert_close(short, torch.nn.functional.normalize(whole[:, :8], dim=-1))


def test_over_http_in_both_encodings(replica, base):
    pool(base, "lasttoken", normalize=True, replica=replica)

    class Replicas:
        ask = replica.answer

    routes = Embeddings(ModelNames("base", replica.registry), Replicas, Authenticator(None))

    def ask(**more) -> dict:
        request = EmbeddingRequest(model="search@1", input=TEXTS, **more)
        return asyncio.run(routes.embed(request, RequestContext("POST", "/v1/embeddings", {})))

    plain, packed = ask(), ask(encoding_format="base64")
    assert plain["model"] == "search@1"
    assert [entry["index"] for entry in plain["data"]] == [0, 1, 2]
    for one, other in zip(plain["data"], packed["data"], strict=True):
        unpacked = np.frombuffer(base64.b64decode(other["embedding"]), "<f4")
        np.testing.assert_allclose(unpacked, np.asarray(one["embedding"], np.float32))


def test_a_chat_model_and_unknown_kinds_are_refused(base, tiny_model):
    with pytest.raises(UserError, match="is no embedding model"):
        embedding_of(tiny_model, "tiny")
    (base / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(UserError, match="pooling_mode_max_tokens"):
        embedding_of(base, "base")
    pool(base, "lasttoken", normalize=False)
    (base / "modules.json").write_text(json.dumps([{"type": "sentence_transformers.models.Dense"}]))
    with pytest.raises(UserError, match="Dense is not served"):
        embedding_of(base, "base")


def test_texts_too_long_are_refused_and_ids_are_told(replica, base):
    found = asyncio.run(replica.answer(EmbedJob(["word " * 500], None)))
    assert found.status == 400
    assert (found.code, found.param) == ("context_length_exceeded", "input")
    reported = asyncio.run(replica.answer(TokenizeJob("hello", with_strings=True)))
    assert reported.ids == replica.engine.tokenizer("hello")["input_ids"]
    assert "".join(reported.strings) == "hello"
    assert asyncio.run(replica.answer(TokenizeJob(ids=reported.ids))) == PlainText("hello")
    chat = [{"role": "user", "content": "hello"}]
    assert asyncio.run(replica.answer(TokenizeJob(messages=chat))).ids == ChatRenderer(
        replica.engine.tokenizer
    ).prompt_ids(chat)
