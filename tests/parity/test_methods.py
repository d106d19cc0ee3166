"""Every way to adapt a model: what is written loads in peft and gives the logits that were trained."""

import pytest
import torch
from tiny import write_tiny_model

from ftray.config.adapter import AdapterConfig
from ftray.config.run import MemoryConfig
from ftray.data.dataset import RowCounts, TokenizedDataset
from ftray.data.examples import examples_of
from ftray.data.pack import pack
from ftray.errors import AdapterError, UserError
from ftray.model.adapters.lora import inject_lora, load_weights_from, without_adapter, write_adapter
from ftray.model.adapters.merge import merge_adapter
from ftray.model.base import prepare_base
from ftray.model.hardware import choose_hardware
from ftray.model.packed import PackedCausalLM, prepare_layers, register_packed_attention
from ftray.model.weights import load_weights
from ftray.train.engine.adamw_8bit import AdamW8bit, dequantize, quantize

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
IDS = torch.tensor([[5, 9, 33, 60, 7, 100, 41]])

METHODS = {
    "lora": {},
    "rslora": {"variant": "rslora"},
    "dora": {"variant": "dora"},
    "pissa": {"initialization": "pissa"},
    "pissa-rslora": {"initialization": "pissa", "variant": "rslora"},
    "patterns": {
        "targets": ["[qv]_proj", r"layers\.1\.mlp\..*"],
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"q_proj": 3.0},
    },
    "embeddings": {"modules_to_save": ["embed_tokens"]},
    "norms": {"modules_to_save": ["norm"], "targets": ["q_proj"]},
}


@pytest.fixture(scope="module")
def untied_base(tmp_path_factory):
    directory = write_tiny_model(tmp_path_factory.mktemp("untied"), tied=False)
    return prepare_base(str(directory))


def trained_model(base, config):
    """The injected model a little away from its start, and what `inject_lora` returned."""
    model = load_weights(base, choose_hardware(), attention="sdpa")
    initial = inject_lora(model, config, seed=0)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model, initial


def written(model, config, base, directory, initial):
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    ties = model.config.tie_word_embeddings
    write_adapter(directory, weights, config, base, metadata={}, initial=initial, ties_embeddings=ties)
    return directory


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_what_is_written_gives_the_trained_logits_in_peft(tiny_base, untied_base, tmp_path, name, tied):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = tiny_base if tied else untied_base
    config = AdapterConfig(rank=4, alpha=8, **METHODS[name])
    model, initial = trained_model(base, config)
    directory = written(model, config, base, tmp_path / "a", initial)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.directory), directory)
    plain = AutoModelForCausalLM.from_pretrained(base.directory)
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, **CLOSE)
        # the twin: the base alone is far from it
        with pytest.raises(AssertionError):
            torch.testing.assert_close(plain(IDS).logits, model(IDS).logits, **CLOSE)
        if initial is None:
            with without_adapter(model):
                torch.testing.assert_close(plain(IDS).logits, model(IDS).logits, **CLOSE)


def test_pissa_without_its_initial_part_is_found(tiny_base, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config = AdapterConfig(rank=4, alpha=8, initialization="pissa")
    model, _ = trained_model(tiny_base, config)
    directory = written(model, config, tiny_base, tmp_path / "a", None)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base.directory), directory)
    with torch.no_grad(), pytest.raises(AssertionError):
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, **CLOSE)


def test_pissa_starts_where_the_base_is(tiny_base):
    model = load_weights(tiny_base, choose_hardware(), attention="sdpa")
    with torch.no_grad():
        before = model(IDS).logits
        inject_lora(model, AdapterConfig(rank=4, alpha=8, initialization="pissa"), seed=0)
        torch.testing.assert_close(model(IDS).logits, before, **CLOSE)


@pytest.mark.parametrize("name", ["lora", "dora", "embeddings", "patterns"])
def test_an_adapter_goes_on_from_an_earlier_one(tiny_base, tmp_path, name):
    config = AdapterConfig(rank=4, alpha=8, **METHODS[name])
    model, _ = trained_model(tiny_base, config)
    directory = written(model, config, tiny_base, tmp_path / "a", None)
    next_model = load_weights(tiny_base, choose_hardware(), attention="sdpa")
    inject_lora(next_model, config, seed=5)
    load_weights_from(directory, next_model, config, label="earlier@1")
    with torch.no_grad():
        assert torch.equal(next_model(IDS).logits, model(IDS).logits)


def test_an_earlier_adapter_that_does_not_fit_is_refused(tiny_base, tmp_path):
    config = AdapterConfig(rank=4, alpha=8)
    model, _ = trained_model(tiny_base, config)
    directory = written(model, config, tiny_base, tmp_path / "a", None)
    for settings, message in (
        ({"rank": 8}, "has r=4, this run 8"),
        ({"targets": ["q_proj"]}, "also has"),
        ({"modules_to_save": ["norm"]}, "lacks"),
    ):
        other = AdapterConfig(**({"rank": 4, "alpha": 8} | settings))
        model = load_weights(tiny_base, choose_hardware(), attention="sdpa")
        inject_lora(model, other, seed=0)
        with pytest.raises(AdapterError, match=message):
            load_weights_from(directory, model, other, label="earlier@1")


def test_targets_and_modules_that_match_nothing_are_refused(tiny_base):
    for settings, message in (
        ({"targets": ["q_prj"]}, r"'q_prj' matches no linear module; the model has .*q_proj"),
        ({"targets": ["("]}, "is no regular expression"),
        ({"modules_to_save": ["embeddings"]}, "'embeddings' is no module of this model"),
    ):
        model = load_weights(tiny_base, choose_hardware(), attention="sdpa")
        with pytest.raises(AdapterError, match=message):
            inject_lora(model, AdapterConfig(**settings), seed=0)


def test_qlora_trains_over_a_base_in_4_bits(tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    attention = register_packed_attention()
    tiny_base = prepare_base(str(write_tiny_model(tmp_path, intermediate_size=128)))
    model = load_weights(tiny_base, choose_hardware(), attention=attention, quantize="nf4")
    linear = model.model.layers[0].mlp.down_proj
    assert isinstance(linear, bitsandbytes.nn.Linear4bit)
    exact = load_weights(tiny_base, choose_hardware(), attention=attention).model.layers[0].mlp.down_proj.weight
    dequantized = bitsandbytes.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
    error = (dequantized - exact).norm() / exact.norm()
    assert 0.02 < error < 0.15, "4 bits are near the weights, and not they"
    inject_lora(model, AdapterConfig(rank=4, alpha=8), seed=0)
    packed = PackedCausalLM(model)
    row = pack(examples_of(tiny_dataset(), [0, 1]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        loss = -packed(row).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
    assert torch.equal(
        dequantized, bitsandbytes.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
    )


def tiny_dataset() -> TokenizedDataset:
    import numpy as np

    ids = np.arange(40, dtype=np.int32) % 37 + 3
    return TokenizedDataset(
        ids,
        np.ones(40, bool),
        sequence_lengths=np.array([13, 27]),
        rows=np.array([1, 2]),
        trained_lengths=np.array([12, 26]),
        sequences_per_example=1,
        row_counts=(RowCounts(2),),
    )


@pytest.mark.parametrize("way", ["activation_checkpointing", "compile"])
def test_memory_settings_change_nothing_but_memory(tiny_base, way):
    def loss_and_gradients(config, *, compiled=False):
        model = load_weights(tiny_base, choose_hardware(), attention=register_packed_attention())
        inject_lora(model, AdapterConfig(rank=4, alpha=8), seed=0)
        packed = PackedCausalLM(prepare_layers(model, config, compiled=compiled)).train()
        loss = -packed(pack(examples_of(tiny_dataset(), [0, 1]))).mean()
        loss.backward()
        return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    loss, gradients = loss_and_gradients(MemoryConfig())
    checkpointed = MemoryConfig(activation_checkpointing=way == "activation_checkpointing")
    other, other_gradients = loss_and_gradients(checkpointed, compiled=way == "compile")
    assert other == pytest.approx(loss, rel=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(other_gradients[name], gradient, rtol=1e-4, atol=1e-6)


def test_lora_plus_groups_are_pefts(tiny_base):
    """The same rate for every parameter as peft's create_loraplus_optimizer gives it."""
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_loraplus_optimizer
    from transformers import AutoModelForCausalLM

    from ftray.config.run import OptimizerConfig
    from ftray.train.engine.optimizer import parameter_groups

    theirs = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_base.directory),
        LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    optimizer = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    expected = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    ours = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    groups = parameter_groups(ours, OptimizerConfig(learning_rate=1e-3, lora_plus_ratio=16))
    found = {id(p): 1e-3 * group["rate_factor"] for group in groups for p in group["params"]}
    assert found == pytest.approx(expected)
    assert len({*found.values()}) == 2


@pytest.mark.parametrize("name", ["rslora", "dora", "embeddings"])
def test_a_merged_base_computes_as_the_adapter_did_and_takes_another(tiny_base, tmp_path, name):
    config = AdapterConfig(rank=4, alpha=8, **METHODS[name])
    model, _ = trained_model(tiny_base, config)
    directory = written(model, config, tiny_base, tmp_path / "a", None)
    merged = prepare_base(str(merge_adapter(directory, tiny_base, tmp_path / "merged", label="a@1")))
    assert merged.fingerprint != tiny_base.fingerprint
    again = load_weights(merged, choose_hardware(), attention="sdpa")
    plain = load_weights(tiny_base, choose_hardware(), attention="sdpa")
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, model(IDS).logits, **CLOSE)
        with pytest.raises(AssertionError):
            torch.testing.assert_close(plain(IDS).logits, model(IDS).logits, **CLOSE)
        inject_lora(again, AdapterConfig(), seed=0)
        torch.testing.assert_close(again(IDS).logits, model(IDS).logits, **CLOSE)
    with pytest.raises(UserError, match="exists already"):
        merge_adapter(directory, tiny_base, tmp_path / "merged", label="a@1")


@pytest.mark.parametrize("size", [1000, 4096])
def test_8_bit_adamw_is_bitsandbytes(size):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    start, grads = torch.randn(size), [torch.randn(size) * 10.0**k for k in (-3, -1, -2, 0)]
    ours, theirs, exact = (torch.nn.Parameter(start.clone()) for _ in range(3))
    settings = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8}
    optimizers = [
        AdamW8bit([{"params": [ours], "weight_decay": 0.1}], **settings),
        bitsandbytes.optim.AdamW8bit([theirs], weight_decay=0.1, min_8bit_size=1, **settings),
        torch.optim.AdamW([exact], weight_decay=0.1, **settings),
    ]
    for grad in grads:
        for parameter, optimizer in zip((ours, theirs, exact), optimizers, strict=True):
            parameter.grad = grad.clone()
            optimizer.step()
    assert torch.equal(ours, theirs)
    assert 0 < (ours - exact).norm() < 0.1 * (start - exact).norm()


@pytest.mark.parametrize("size", [1000, 4096])
def test_8_bit_moments_survive_a_checkpoint_exactly(size):
    from bitsandbytes.functional import create_dynamic_map

    torch.manual_seed(0)
    for signed in (True, False):
        code_map = create_dynamic_map(signed=signed)
        values = torch.randn(size) if signed else torch.rand(size)
        codes, blocks = quantize(values, code_map, None)
        restored = dequantize(codes, blocks, code_map)
        assert (restored - values).norm() < 0.02 * values.norm()
        assert torch.equal(quantize(restored, code_map, blocks)[0], codes)
