"""Adapter directories: plain PEFT, and every way one can be wrong."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import write_peft_adapter, write_tiny_model

from ftray.config.adapter import AdapterConfig
from ftray.errors import AdapterError
from ftray.infer.torch_engine.lora.bank import LoraBank
from ftray.model.adapters.lora import inject_lora, write_adapter
from ftray.model.adapters.weights import read_adapter
from ftray.model.base import prepare_base
from ftray.model.hardware import choose_hardware
from ftray.model.weights import load_weights


@pytest.fixture
def adapter(adapters, tmp_path):
    return shutil.copytree(adapters["r8"], tmp_path / "adapter")


def edit_config(directory, **changes):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(directory, change):
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def first(tensors, part):
    return next(key for key in tensors if part in key)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "adapter_config.json").unlink(), "no adapter_config.json"),
        (lambda d: (d / "adapter_config.json").write_text("{"), "is not JSON"),
        (lambda d: (d / "adapter_config.json").write_bytes(b'{"r": "\xff"}'), "is not JSON"),
        (lambda d: (d / "adapter_config.json").write_text("[" * 100_000), "is not JSON"),
        (lambda d: (d / "adapter_config.json").write_text("[]"), "is no JSON object"),
        (lambda d: edit_config(d, peft_type="IA3"), "only LORA is served"),
        (lambda d: edit_config(d, alpha_pattern={"(": 1}), "no scale from lora_alpha"),
        (lambda d: edit_config(d, alpha_pattern=[1]), "no scale from lora_alpha"),
        (lambda d: edit_config(d, alpha_pattern={"([a-z._0-9]+)+!": 1}), "repeats a group"),
        (lambda d: edit_config(d, alpha_pattern={"[a-z._]*" * 20 + "!": 1}), "more than 3 things"),
        (lambda d: edit_config(d, lora_alpha=10**400), "no scale from lora_alpha"),
        (lambda d: edit_config(d, use_dora=True), "use_dora=True cannot be served"),
        (lambda d: edit_config(d, init_lora_weights="pissa_niter_4"), "'pissa_niter_4' changes its base"),
        (lambda d: edit_config(d, alora_invocation_tokens=[5, 6]), r"alora_invocation_tokens=\[5, 6\] cannot be"),
        (lambda d: edit_config(d, lora_alpha=float("nan")), "lora_alpha makes the scale nan"),
        (lambda d: edit_config(d, lora_alpha=None), "no scale from lora_alpha"),
        (lambda d: edit_config(d, modules_to_save=["lm_head"]), "merge it into its base"),
        (lambda d: (d / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors"),
        (lambda d: (d / "adapter_model.safetensors").write_bytes(b"x" * 100), "is corrupt"),
        (
            lambda d: (d / "adapter_model.safetensors").write_bytes(
                (d / "adapter_model.safetensors").read_bytes()[:-99]
            ),
            "is corrupt",
        ),
        (lambda d: edit_weights(d, lambda t: t.pop(first(t, "lora_B"))), "do not fit together"),
        (lambda d: edit_weights(d, lambda t: t.update({first(t, "lora_B"): torch.zeros(8)})), "do not fit together"),
        (lambda d: edit_weights(d, lambda t: t[first(t, "lora_A")].fill_(float("nan"))), "holds NaN"),
        (
            lambda d: edit_weights(d, lambda t: t.update({first(t, "lora_A"): t[first(t, "lora_A")].double() * 1e300})),
            "holds NaN or infinity",
        ),
        (lambda d: edit_weights(d, lambda t: t.update(extra=torch.zeros(1))), "is no LoRA weight"),
        (lambda d: edit_weights(d, lambda t: t.clear() or t.update(x=torch.zeros(1))), "no LoRA weight"),
    ],
)
def test_a_corrupt_adapter_says_what_is_wrong(adapter, damage, message):
    damage(adapter)
    with pytest.raises(AdapterError, match=message):
        read_adapter(adapter, label="support@1")


def test_an_adapter_of_another_shape_is_refused_and_harms_nobody(tmp_path, tiny_base, adapters):
    from transformers import LlamaConfig, LlamaForCausalLM

    other = write_tiny_model(tmp_path / "other")
    config = LlamaConfig.from_pretrained(other)
    config.hidden_size, config.intermediate_size = 32, 48
    LlamaForCausalLM(config).save_pretrained(other)
    foreign = write_peft_adapter(tmp_path / "foreign", other, rank=4, seed=0)
    model = load_weights(tiny_base, choose_hardware(), attention="sdpa")
    bank = LoraBank(model, device_budget=2**30)
    bank.load(bank.prepare("good@1", read_adapter(adapters["r4"], label="good@1")))
    with pytest.raises(AdapterError, match=r"foreign@1: .* maps 48 to 32, the base model's maps 96 to 64"):
        bank.prepare("foreign@1", read_adapter(foreign, label="foreign@1"))
    assert "good@1" in bank
    assert "foreign@1" not in bank


@pytest.mark.parametrize(
    "options", [{"use_rslora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 8}}]
)
def test_scales_are_pefts(tmp_path, tiny_model, options):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    directory = write_peft_adapter(tmp_path / "a", tiny_model, rank=4, seed=0, **options)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), directory)
    ours = read_adapter(directory, label="a")
    for name, module in ours.modules.items():
        assert module.scale == pytest.approx(model.get_base_model().get_submodule(name).scaling["default"]), name


def test_what_we_write_peft_loads(tmp_path, tiny_base):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config = AdapterConfig(rank=4, alpha=8)
    model = load_weights(tiny_base, choose_hardware(), attention="sdpa")
    inject_lora(model, config, seed=0)
    weights = {name: torch.randn_like(p) * 0.1 for name, p in model.named_parameters() if p.requires_grad}
    model.load_state_dict(weights, strict=False)
    write_adapter(tmp_path / "a", weights, config, tiny_base, metadata={"run": "x"})
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base.directory), tmp_path / "a")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


def test_fingerprints_tell_models_apart(tmp_path, tiny_model, tiny_base):
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    assert prepare_base(str(copy)).fingerprint == tiny_base.fingerprint
    other = write_tiny_model(tmp_path / "other", seed=1)
    assert prepare_base(str(other)).fingerprint != tiny_base.fingerprint


def test_models_that_would_be_computed_wrongly_are_refused(tmp_path, tiny_model):
    from ftray.errors import UserError
    from ftray.model.base import check_length
    from ftray.model.families import check_layers

    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    plain = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(plain | {"layer_types": ["indexed_attention", "full_attention"]}))
    with pytest.raises(UserError, match="uses indexed attention"):
        check_layers(prepare_base(str(copy)))
    (copy / "config.json").write_text(json.dumps(plain | {"layer_types": ["sliding_attention", "full_attention"]}))
    base = prepare_base(str(copy))
    check_layers(base)
    check_length(base, 4096, key="engine.context_tokens")
    with pytest.raises(UserError, match=r"engine\.context_tokens: 4097 is over"):
        check_length(base, 4097, key="engine.context_tokens")
