"""The embedded SmolLM2-135M: converted from GGUF, rendered by its own template, packed and served like transformers."""

import pytest
import torch

from ftray.config.run import DataConfig
from ftray.config.serve import EngineConfig
from ftray.data.pack import pack
from ftray.data.tokens import tokenize_source
from ftray.infer.protocol import Request, Sampling
from ftray.infer.torch_engine import TorchEngine, generate
from ftray.model.base import prepare_base
from ftray.model.chat import ChatRenderer
from ftray.model.hardware import choose_hardware

pytestmark = pytest.mark.real_model
TRAIN = "configs/quickstart/data/train.jsonl"


@pytest.fixture(scope="module")
def base():
    return prepare_base("smollm2-135m")


@pytest.fixture(scope="module")
def engine(base):
    return TorchEngine(base, choose_hardware(), EngineConfig(context_tokens=256, kv_cache_tokens=1024), max_rank=16)


@pytest.fixture(scope="module")
def reference(base):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base.directory)


def test_the_shipped_data_trains_only_the_intent(engine):
    data = DataConfig(train=TRAIN)
    renderer = ChatRenderer(engine.tokenizer)
    dataset = tokenize_source("data.train", TRAIN, data, renderer)
    ids, trained = dataset.example(0)
    assert renderer.tokenizer.decode(ids[trained]) == "age_limit<|im_end|>"
    assert dataset.counts()["examples"] == 480


def test_packed_log_probabilities_are_transformers(engine, reference):
    dataset = tokenize_source("data.train", TRAIN, DataConfig(train=TRAIN), ChatRenderer(engine.tokenizer))
    packed = engine.score(pack(dataset, [0, 1, 2, 3]), None)
    alone = []
    for i in range(4):
        row = pack(dataset, [i])
        with torch.no_grad():
            logits = reference(row.ids_T[None]).logits[0].log_softmax(-1)
        alone.append(logits[row.rows_N].gather(1, row.targets_N[:, None])[:, 0])
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-4, atol=1e-3)


def test_greedy_answers_are_transformers_generate(engine, reference):
    renderer = ChatRenderer(engine.tokenizer)
    prompt = renderer.prompt_ids([{"role": "user", "content": "What is the capital of France?"}])
    served = generate(engine, [Request("a", prompt, Sampling(temperature=0, max_tokens=8))])["a"]
    stop = list(engine.stop_ids)
    out = reference.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=stop)
    assert served == engine.tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True)
    assert "Paris" in served
