"""The embedded SmolLM2-135M: converted from GGUF, rendered by its own template, packed and served like transformers."""

from pathlib import Path

import pytest
import torch
from ranks import Record, train_on_ranks

from ftray.config.data import DataConfig
from ftray.config.serve import AdaptersConfig, EngineConfig
from ftray.data.examples import examples_of
from ftray.data.pack import pack
from ftray.data.tokens import tokenize_source
from ftray.infer.engines import generate
from ftray.infer.protocol import Request, SamplingParams
from ftray.infer.torch_engine.engine import TorchEngine
from ftray.model.base import prepare_base
from ftray.model.chat import ChatRenderer
from ftray.model.hardware import choose_hardware

pytestmark = pytest.mark.real_model
TRAIN = "configs/quickstart/data/train.jsonl"
# Measured first, over 3 steps: losses differed by 5e-7 of themselves, weights by 8e-5 of the norm of their change.
LOSS_BOUND, WEIGHT_BOUND = 1e-5, 3e-4


@pytest.fixture(scope="module")
def base():
    return prepare_base("smollm2-135m")


@pytest.fixture(scope="module")
def engine(base):
    return TorchEngine(
        base, choose_hardware(), EngineConfig(context_tokens=256, kv_cache_tokens=1024), AdaptersConfig(max_rank=16)
    )


@pytest.fixture(scope="module")
def reference(base):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base.directory)


def test_the_shipped_data_trains_only_the_intent(engine):
    data = DataConfig(train=TRAIN)
    renderer = ChatRenderer(engine.tokenizer)
    dataset = tokenize_source("data.train", TRAIN, data, renderer)
    ids, trained = dataset.sequences(0)[0]
    assert renderer.tokenizer.decode(ids[trained]) == "age_limit<|im_end|>"
    assert dataset.counts()["examples"] == 480


def test_packed_log_probabilities_are_transformers(engine, reference):
    dataset = tokenize_source("data.train", TRAIN, DataConfig(train=TRAIN), ChatRenderer(engine.tokenizer))
    packed = engine.score(pack(examples_of(dataset, [0, 1, 2, 3])), None)
    alone = []
    for i in range(4):
        row = pack(examples_of(dataset, [i]))
        with torch.no_grad():
            logits = reference(row.ids_T[None]).logits[0].log_softmax(-1)
        alone.append(logits[row.rows_N].gather(1, row.targets_N[:, None])[:, 0])
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-4, atol=1e-3)


def test_greedy_answers_are_transformers_generate(engine, reference):
    renderer = ChatRenderer(engine.tokenizer)
    prompt = renderer.prompt_ids([{"role": "user", "content": "What is the capital of France?"}])
    served = generate(engine, [Request("a", prompt, SamplingParams(temperature=0, max_tokens=8))])["a"]
    stop = list(engine.stop_ids)
    out = reference.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=stop)
    assert served == engine.tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True)
    assert "Paris" in served


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("real")
    rows = out / "train.jsonl"
    rows.write_text("".join(Path(TRAIN).read_text().splitlines(keepends=True)[:24]))
    settings = {"optimizer.learning_rate": 1e-3}
    one = Record("one-by-one", steps=3, tokens_per_micro_batch=96, settings=settings)
    two = Record("2-ranks-z3", world_size=2, stage=3, steps=3, settings=settings)
    fixed = {"base_directory": str(base.directory), "train_file": str(rows)}
    return {r.name: train_on_ranks(r.world_size, [r], out, **fixed)[r.name] for r in (one, two)}


def test_a_step_is_a_set_of_examples_on_the_real_model_too(trained):
    one, two = trained["one-by-one"], trained["2-ranks-z3"]
    assert two.losses == pytest.approx(one.losses, rel=LOSS_BOUND)
    assert one.change_from(two) < WEIGHT_BOUND
