"""Adapters trained side by side over one base get the losses and gradients that each gets alone, through PEFT."""

import pytest
import torch
from tiny import chat_rows, write_jsonl

from ftray.config.adapter import AdapterConfig
from ftray.config.data import DataConfig
from ftray.data.examples import examples_of
from ftray.data.pack import pack
from ftray.data.tokens import tokenize_source
from ftray.errors import AdapterError
from ftray.model.adapters.fused_lora import FusedLora
from ftray.model.adapters.lora import inject_lora
from ftray.model.hardware import choose_hardware
from ftray.model.packed import PackedCausalLM, register_packed_attention
from ftray.model.weights import load_weights

# float32 sums in another order
CLOSE = {"rtol": 1e-4, "atol": 1e-6}
ADAPTERS = {
    "small": (AdapterConfig(rank=2, alpha=4), [0, 3], 5),
    "wide": (AdapterConfig(rank=16, alpha=8, targets=["q_proj", "down_proj"]), [1], 6),
    "rs": (AdapterConfig(variant="rslora", rank=4, alpha=32, rank_pattern={"v_proj": 8}), [2, 0, 4], 7),
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, renderer):
    path = write_jsonl(tmp_path_factory.mktemp("d") / "d.jsonl", chat_rows(6, seed=3))
    return tokenize_source("data.train", str(path), DataConfig(train=str(path)), renderer)


def load(tiny_base):
    return load_weights(tiny_base, choose_hardware(), attention=register_packed_attention())


def disturb(parameters) -> None:
    """B starts at zero, where A has no gradient."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in sorted(parameters):
            parameters[name] += 0.05 * torch.randn(parameters[name].shape, generator=generator)


def alone(tiny_base, dataset, config, examples, seed):
    """Log-probabilities and gradients by name."""
    model = load(tiny_base)
    inject_lora(model, config, seed=seed)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    start = {name: p.detach().clone() for name, p in parameters.items()}
    disturb(parameters)
    log_probs = PackedCausalLM(model)(pack(examples_of(dataset, examples)))
    log_probs.mean().backward()
    return start, log_probs.detach(), {name: p.grad for name, p in parameters.items()}


def together(tiny_base, dataset, names, *, tokens_off: int = 0, drop: str | None = None):
    model = load(tiny_base)
    fused = FusedLora(model)
    starts = {}
    for name in ADAPTERS:
        config, _, seed = ADAPTERS[name]
        parameters = fused.add(name, config, seed=seed)
        starts[name] = {key: p.detach().clone() for key, p in parameters.items()}
        disturb(parameters)
    if drop is not None:
        fused.remove(drop)
    examples = {name: ADAPTERS[name][1] for name in names}
    counts = {name: int(dataset.lengths[of].sum()) for name, of in examples.items()}
    spans = list(counts.items())
    spans[0] = names[0], counts[names[0]] - tokens_off
    spans[-1] = names[-1], spans[-1][1] + tokens_off
    with fused.apply(spans):
        log_probs_N = PackedCausalLM(model)(
            pack(examples_of(dataset, [index for of in examples.values() for index in of]))
        )
    parts = log_probs_N.split([len(pack(examples_of(dataset, of)).rows_N) for of in examples.values()])
    torch.stack([part.mean() for part in parts]).sum().backward()
    gradients = {name: {key: p.grad for key, p in fused.adapters[name].items()} for name in names}
    return starts, dict(zip(names, (part.detach() for part in parts), strict=True)), gradients, model


def compare(tiny_base, dataset, names, **how) -> None:
    starts, log_probs, gradients, _ = together(tiny_base, dataset, names, **how)
    for name in names:
        config, examples, seed = ADAPTERS[name]
        start, expected, expected_gradients = alone(tiny_base, dataset, config, examples, seed)
        assert starts[name].keys() == start.keys()
        assert all(torch.equal(starts[name][key], start[key]) for key in start)
        torch.testing.assert_close(log_probs[name], expected, **CLOSE)
        for key, expected_gradient in expected_gradients.items():
            difference = (gradients[name][key] - expected_gradient).norm() / expected_gradient.norm()
            assert difference < 1e-5, f"{name}: {key} differs by {difference:.1e}"


def test_each_adapter_computes_and_learns_as_it_would_alone(tiny_base, dataset):
    compare(tiny_base, dataset, list(ADAPTERS))


def test_tokens_given_to_a_neighbour_are_found(tiny_base, dataset):
    """The twin. (Of an example's last tokens nothing is learned.)"""
    with pytest.raises(AssertionError):
        compare(tiny_base, dataset, list(ADAPTERS), tokens_off=4)


def test_an_adapter_that_leaves_changes_nothing_for_the_others(tiny_base, dataset):
    compare(tiny_base, dataset, ["small", "rs"], drop="wide")


def test_without_adapters_it_is_the_base_and_the_base_learns_nothing(tiny_base, dataset):
    *_, model = together(tiny_base, dataset, list(ADAPTERS))
    row = pack(examples_of(dataset, [0, 1]))
    torch.testing.assert_close(PackedCausalLM(model)(row), PackedCausalLM(load(tiny_base))(row), **CLOSE)
    assert all(not p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "settings",
    [{"variant": "dora"}, {"initialization": "pissa"}, {"dropout": 0.1}, {"modules_to_save": ["embed_tokens"]}],
    ids=lambda settings: next(iter(settings)),
)
def test_what_is_no_plain_sum_over_the_base_is_refused(tiny_base, settings):
    fused = FusedLora(load(tiny_base))
    with pytest.raises(AdapterError, match=f"adapter.{next(iter(settings))}"):
        fused.add("a", AdapterConfig(**settings), seed=0)


def test_adapters_and_so_their_moments_are_float32_over_a_bfloat16_base(tiny_base):
    fused = FusedLora(load(tiny_base).to(torch.bfloat16))
    parameters = fused.add("a", AdapterConfig(), seed=0)
    assert {p.dtype for p in parameters.values()} == {torch.float32}
    with fused.apply([("a", 5)]):
        layer = next(iter(fused._layers.values()))
        out = layer(torch.ones(5, layer.base.in_features, dtype=torch.bfloat16, requires_grad=True))
        out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert next(iter(parameters.values())).grad.dtype == torch.float32


def test_the_output_head_is_refused(tmp_path):
    from tiny import write_tiny_model

    from ftray.model.base import prepare_base

    fused = FusedLora(load(prepare_base(str(write_tiny_model(tmp_path, tied=False)))))
    with pytest.raises(AdapterError, match="output head"):
        fused.add("a", AdapterConfig(targets=["q_proj", "lm_head"]), seed=0)


def test_what_follows_a_layer_stays_when_adapters_come(tiny_base):
    """A hook on a projection (Llama 4's temperature) is a hook on whatever stands in its place."""
    model, calls = load(tiny_base), []
    name = "model.layers.0.self_attn.q_proj"
    model.get_submodule(name).register_forward_hook(lambda module, inputs, output: calls.append(output.shape))
    fused = FusedLora(model)
    config, _, seed = next(iter(ADAPTERS.values()))
    fused.add("a", config, seed=seed)
    layer = model.get_submodule(name)
    with fused.apply([("a", 1)]):
        layer(torch.zeros(1, 1, layer.base.in_features))
    assert len(calls) == 1
