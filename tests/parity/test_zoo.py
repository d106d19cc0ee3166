"""The zoo: a random twin of each architecture, trained (packed, LoRA and its gradients) and served (in chunks, beside
others, out of shared and lost pages, with an adapter), is what transformers and PEFT compute; or it is refused."""

import functools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import zoo
from pydantic import ValidationError
from zoo import ALL_RIGHT, REFUSED, TRAINED, write_base

from ftray.config.adapter import AdapterConfig
from ftray.config.serve import AdaptersConfig, EngineConfig
from ftray.errors import AdapterError, UserError
from ftray.infer.protocol import Request, SamplingParams
from ftray.infer.torch_engine import attention, proof, states, text_model
from ftray.infer.torch_engine.engine import TorchEngine
from ftray.infer.torch_engine.lora import experts as lora_experts
from ftray.infer.torch_engine.proof import Answer, served_problem, take
from ftray.model import packed, packed_attention, twin
from ftray.model.adapters.lora import inject_lora, options_of, write_adapter
from ftray.model.families import SlidingAttention, rotary
from ftray.model.families.recurrent import PackedStates
from ftray.model.hardware import choose_hardware
from ftray.model.packed_attention import packed_layout
from ftray.model.proof import (
    adapter_problem,
    check_packed,
    disturb,
    log_probs,
    packed_problem,
    sequences,
)
from ftray.model.twin import save_twin, twin_of

BANK = AdaptersConfig()


@pytest.fixture(autouse=True)
def _one_thread():
    """Matrices of these sizes are slower on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ALL_RIGHT)
def test_trained_and_served_as_transformers_computes_it(name, tmp_path):
    base = write_base(tmp_path, name)
    assert packed_problem(base) is None
    assert served_problem(base) is None
    assert zoo.row(name, twin_of(base)) in page(), "python tests/parity/zoo.py writes it"


@functools.cache
def page() -> list[str]:
    return zoo.PAGE.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("name", TRAINED)
def test_trained_and_not_served(name, tmp_path):
    base = write_base(tmp_path, name)
    assert packed_problem(base) is None
    assert TRAINED[name] in (served_problem(base) or "")


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_what_differs(name, tmp_path):
    base = write_base(tmp_path, name)
    with pytest.raises(UserError, match=REFUSED[name]):
        check_packed(base)
    assert served_problem(base) is not None


def test_the_page_has_the_refused_and_how_many_are_right():
    assert {*zoo.rows_of_others()} <= {*page()}, "python tests/parity/zoo.py writes it"
    assert f" {len(ALL_RIGHT)} are" in "\n".join(page())


# -- the twins: what each part is for ------------------------------------------------------------------------------


def test_a_forgotten_window_is_found(tmp_path, monkeypatch):
    base = write_base(tmp_path, "mistral")
    real = packed_attention.packed_causal_attention
    with monkeypatch.context() as patch:
        patch.setattr(packed_attention, "packed_causal_attention", lambda *a, window=None, **rest: real(*a, **rest))
        assert "packed rows differ" in (packed_problem(base) or "")
    monkeypatch.setattr(SlidingAttention, "first_seen", lambda self, position: 0)
    assert "answers differ" in (served_problem(base) or "")


@pytest.mark.parametrize(("name", "what"), [("gemma2", "softcap"), ("gpt_oss", "sinks_H")])
def test_forgotten_caps_and_sinks_are_found(name, what, tmp_path, monkeypatch):
    base = write_base(tmp_path, name)
    real = packed_attention.scores_of
    for module in (packed_attention, attention):
        without = lambda given: {key: value for key, value in real(given).items() if key != what}  # noqa: E731
        monkeypatch.setattr(module, "scores_of", without)
    assert "packed rows differ" in (packed_problem(base) or "")
    assert "answers differ" in (served_problem(base) or "")


def test_forgotten_factors_of_logits_are_found(tmp_path, monkeypatch):
    from ftray.model.heads import causal_lm

    base = write_base(tmp_path, "cohere")
    monkeypatch.setattr(causal_lm, "logits_of", lambda config: lambda product: product)
    monkeypatch.setattr(text_model, "logits_of", lambda config: lambda product: product)
    assert "packed rows differ" in (packed_problem(base) or "")
    assert "answers differ" in (served_problem(base) or "")


@pytest.mark.parametrize("name", ["qwen3_next", "lfm2", "mamba2"])
def test_a_state_that_crosses_sequences_is_found(name, tmp_path, monkeypatch):
    base = write_base(tmp_path, name)
    whole = PackedStates.of_row
    one = lambda self, layout: whole(self, packed_layout([sum(layout.lengths)]))  # noqa: E731
    monkeypatch.setattr(PackedStates, "of_row", one)
    assert "packed rows differ" in (packed_problem(base) or "")


def test_a_state_that_is_not_gone_on_from_is_found(tmp_path, monkeypatch):
    base = write_base(tmp_path, "qwen3_next")
    real = states.StateStore.of_pieces

    def anew(store, pieces):
        real(store, pieces)
        store._rows = [replace(rows, goes_on=False) if rows.length > 1 else rows for rows in store._rows]

    monkeypatch.setattr(states.StateStore, "of_pieces", anew)
    assert "answers differ" in (served_problem(base) or "")


def test_a_page_is_not_enough_where_a_state_is_missing(tmp_path, monkeypatch):
    base = write_base(tmp_path, "lfm2")
    monkeypatch.setattr(states.StateStore, "__contains__", lambda store, name: True)
    monkeypatch.setattr(states.StateStore, "restore", lambda store, sequence: None)
    assert served_problem(base) is not None


def test_rotation_by_the_longest_of_a_row_is_found(tmp_path, monkeypatch):
    base = write_base(tmp_path, "phi3 (longrope)")
    monkeypatch.setattr(packed, "PackedRotary", lambda decoder: rotary.PackedRotary(torch.nn.Module()))
    monkeypatch.setattr(rotary, "short_context", lambda config: None)
    monkeypatch.setattr(torch.nn.Module, "config", None, raising=False)
    assert "packed rows differ" in (packed_problem(base) or "")


def test_temperature_by_the_place_in_a_row_is_found(tmp_path, monkeypatch):
    base = write_base(tmp_path, "llama4_text")
    monkeypatch.setattr(packed.QueryTemperature, "__init__", lambda self, decoder: None)
    assert "packed rows differ" in (packed_problem(base) or "")


def test_lora_that_no_gradient_reaches_is_found(tmp_path, monkeypatch):
    base = write_base(tmp_path, "llama")
    whole = packed_attention.packed_causal_attention
    frozen = lambda query, *rest, **how: whole(query.detach(), *rest, **how)  # noqa: E731
    monkeypatch.setattr(packed_attention, "packed_causal_attention", frozen)
    assert "gradients of LoRA differ" in (adapter_problem(base) or "")


def test_the_proof_loses_pages_and_finds_some(tmp_path, monkeypatch):
    """What it says it compares does happen."""
    seen, close = [], TorchEngine.close
    monkeypatch.setattr(TorchEngine, "close", lambda engine: (seen.append(engine.stats()), close(engine)))
    for name in ("llama", "qwen3_next"):
        assert served_problem(write_base(tmp_path / name, name)) is None
    assert all(stats.num_preemptions > 0 and stats.prompt_tokens_cached > 0 for stats in seen), seen


def test_the_zoo_is_no_part_of_the_project():
    assert not any("zoo" in path.name for path in (Path(proof.__file__).parents[2]).rglob("*.py"))


# -- LoRA on experts -----------------------------------------------------------------------------------------------

WITH_EXPERTS = ["qwen3_moe", "mixtral", "gpt_oss", "glm4_moe", "granitemoe", "deepseek_v3", "qwen3_5_moe_text"]


def test_square_experts_are_changed_the_right_way_round(tmp_path, monkeypatch):
    """gpt-oss' `down_proj` is as wide as high: its shape does not tell input from output."""
    directory = tmp_path / "square"
    base = write_base(directory, "gpt_oss")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"intermediate_size": config["hidden_size"]}))
    monkeypatch.setitem(twin.SMALL, "intermediate_size", twin.SMALL["hidden_size"])
    check_expert_adapter(base, tmp_path)
    monkeypatch.setattr(lora_experts, "is_transposed", lambda module: False)  # the twin
    with pytest.raises((AssertionError, RuntimeError)):
        check_expert_adapter(base, tmp_path)


def expert_adapter(base, tmp_path):
    """(PEFT's model with a disturbed adapter as training makes it, the base and the adapter as directories)"""
    config = AdapterConfig(rank=2, alpha=3, experts=True)
    model = twin_of(base)
    whole = save_twin(base, model, tmp_path / "whole")
    inject_lora(model, config, seed=0)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    disturb(trained)
    weights = {name: parameter.detach() for name, parameter in trained.items()}
    write_adapter(tmp_path / "adapter", weights, config, whole, metadata={}, options=options_of(model))
    return model, whole, tmp_path / "adapter"


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_lora_on_experts_is_trained_and_served_as_peft_does(name, tmp_path):
    base = write_base(tmp_path / "base", name)
    assert adapter_problem(base, experts=True) is None
    check_expert_adapter(base, tmp_path)


def check_expert_adapter(base, tmp_path) -> None:
    model, whole, directory = expert_adapter(base, tmp_path)
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(whole.directory), directory)
    ids = sequences()[0]
    with torch.no_grad():
        torch.testing.assert_close(log_probs(loaded, ids), log_probs(model, ids), rtol=1e-4, atol=1e-4)
    engine = TorchEngine(whole, choose_hardware(), EngineConfig(context_tokens=64, kv_cache_tokens=256), BANK)
    engine.load_adapter(engine.prepare_adapter("a", directory))
    sampling = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=0, prompt_logprobs=0)
    found = {"0": Answer(ids, "a", tells_prompt=True), "1": Answer(sequences()[1], None, tells_prompt=True)}
    for number, answer in found.items():
        engine.add(Request(number, answer.prompt, sampling, answer.adapter))
    while engine.has_work:
        take(engine.step(), found)
    with torch.no_grad():
        right = [found["0"].expected(model), found["1"].expected(twin_of(base))]
    for answer, expected in zip(found.values(), right, strict=True):
        torch.testing.assert_close(torch.tensor(answer.log_probs), expected, rtol=2e-4, atol=2e-4)


def test_experts_that_take_the_update_of_others_are_found(tmp_path, monkeypatch):
    """The twin: an engine that reads PEFT's B as if experts came first."""
    base = write_base(tmp_path / "base", "qwen3_moe")
    model, whole, directory = expert_adapter(base, tmp_path)
    wrong = lambda a, bt, n: bt.unflatten(0, (n, -1)).transpose(1, 2) @ a.unflatten(0, (n, -1))  # noqa: E731
    monkeypatch.setattr(lora_experts, "expert_update", wrong)
    engine = TorchEngine(whole, choose_hardware(), EngineConfig(context_tokens=64, kv_cache_tokens=256), BANK)
    engine.load_adapter(engine.prepare_adapter("a", directory))
    ids = sequences()[0]
    engine.add(Request("0", ids, SamplingParams(max_tokens=1, logprobs=0, prompt_logprobs=0), "a"))
    found = {"0": Answer(ids, "a", tells_prompt=True)}
    take(engine.step(), found)
    with torch.no_grad():
        assert (torch.tensor(found["0"].log_probs) - found["0"].expected(model)).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss", "qwen2_moe", "glm4_moe", "deepseek_v3"])
def test_all_linear_leaves_experts_and_their_routers_alone(name, tmp_path):
    model = twin_of(write_base(tmp_path, name))
    inject_lora(model, AdapterConfig(rank=2), seed=0)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert not [name for name in trained if "mlp.experts" in name or "gate." in name or "router" in name]
    assert {name.split(".")[4] for name in trained if "self_attn" in name} >= {"o_proj"}


def test_experts_are_refused_where_there_are_none_and_with_what_peft_refuses(tmp_path):
    with pytest.raises(AdapterError, match=r"adapter\.experts: this base has no experts"):
        inject_lora(twin_of(write_base(tmp_path, "llama")), AdapterConfig(experts=True), seed=0)
    with pytest.raises(ValidationError, match=r"experts do not go with dropout: 0\.1"):
        AdapterConfig(experts=True, dropout=0.1)
    with pytest.raises(ValidationError, match="alpha_pattern does not go with them"):
        AdapterConfig(experts=True, alpha_pattern={"down_proj": 4})
    with pytest.raises(ValidationError, match="experts do not go with variant: dora"):
        AdapterConfig(experts=True, variant="dora")
