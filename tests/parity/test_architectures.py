"""Bases of several families through the engine: each answer, of the base and of an adapter on it, is transformers'."""

import pytest
import torch
from engine_contract import Reference, greedy, run, tokens
from tiny import INITIALIZER_RANGE, SIZES, make_tokenizer, write_peft_adapter

from ftray.config.serve import AdaptersConfig, EngineConfig
from ftray.infer.engines import load_adapter
from ftray.infer.protocol import Request
from ftray.infer.torch_engine import attention, decoder
from ftray.infer.torch_engine.engine import TorchEngine
from ftray.model.base import prepare_base
from ftray.model.hardware import choose_hardware

LONG_POSITIONS = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {
    "llama": {"rope_parameters": LONG_POSITIONS},
    "mistral": {"sliding_window": None, "head_dim": 32},
    "qwen2": {},  # q, k and v have biases
    "qwen3": {"head_dim": 32},  # q and k are normed head by head
    "llama with another activation": {"hidden_act": "relu"},
    "phi3": {"pad_token_id": 0, "bos_token_id": 1},  # q, k, v in one layer: through transformers' forward
    "gemma": {"head_dim": 16},  # other norms, GELU: through transformers' forward
}
BY_TRANSFORMERS = {"llama with another activation", "phi3", "gemma"}
PROMPTS = [[5, 9, 33, 60, 7], list(range(20, 120)), [40, 41, 42]]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory, step_operations):
    from transformers import AutoConfig, AutoModelForCausalLM

    directory = tmp_path_factory.mktemp(request.param.split()[0])
    tokenizer = make_tokenizer()
    config = AutoConfig.for_model(
        request.param.split()[0],
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        initializer_range=INITIALIZER_RANGE,
        eos_token_id=tokenizer.eos_token_id,
        **(SIZES | FAMILIES[request.param]),
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:  # made as ones and zeros, which would hide a forgotten one
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    base = prepare_base(str(directory))
    adapter = write_peft_adapter(directory / "adapter", directory, rank=4, seed=1)
    return request.param, base, adapter


def make_engine(base, adapter) -> TorchEngine:
    config = EngineConfig(context_tokens=256, kv_cache_tokens=2048, max_prefill_tokens=32)
    engine = TorchEngine(base, choose_hardware(), config, AdaptersConfig(max_rank=8))
    load_adapter(engine, "a", adapter)
    return engine


def check(engine, base, adapter) -> None:
    requests = [Request(f"{i}", p, greedy(), "a" if i % 2 else None) for i, p in enumerate(PROMPTS * 2)]
    answers = run(engine, requests)
    reference = Reference(base.directory, {"a": adapter})
    for request in requests:
        reference.check_greedy(request.adapter, list(request.prompt_ids), tokens(answers[(request.id, 0)]))


def test_answers_are_transformers(family):
    name, base, adapter = family
    engine = make_engine(base, adapter)
    assert isinstance(engine._text.stack, decoder.TransformersStack) == (name in BY_TRANSFORMERS)
    check(engine, base, adapter)


def test_attention_of_another_temperature_is_found(family, monkeypatch):
    """The twin, on both ways."""
    _, base, adapter = family
    real = attention.attend

    def hotter(query, key_value, layer, step, *, scaling, **rest):
        return real(query, key_value, layer, step, scaling=2 * scaling, **rest)

    for module in (attention, decoder):
        monkeypatch.setattr(module, "attend", hotter)
    with pytest.raises(AssertionError, match="not what greedy decoding gives"):
        check(make_engine(base, adapter), base, adapter)
