"""Bases whose files are quantised (fp8, MXFP4) are loaded as the whole weights that their files mean."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_tokenizer, write_tiny_model
from zoo import write_base

from ftray.config.adapter import AdapterConfig
from ftray.errors import UserError
from ftray.infer.engines import check_served
from ftray.model.adapters.targets import describe_experts
from ftray.model.base import prepare_base
from ftray.model.hardware import choose_hardware
from ftray.model.proof import check_packed
from ftray.model.twin import save_twin, twin_of
from ftray.model.weight_files import weight_shapes
from ftray.model.weight_precision import precision_of
from ftray.model.weights import load_weights

BLOCK = 128  # of fp8, in both directions
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])  # OCP's E2M1, by its four bits
SIZES = {"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 4, "head_dim": 64}


def quantise(directory, method: str, tensors: dict, **settings) -> None:
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    quantised = {"quantization_config": {"quant_method": method, **settings}}
    (directory / "config.json").write_text(json.dumps(config | quantised))


def test_fp8(tmp_path):
    """DeepSeek's: blocks of 128 x 128, each with the factor to multiply by."""
    write_tiny_model(tmp_path, tied=False, **SIZES)
    tensors, right = load_file(tmp_path / "model.safetensors"), {}
    for name in [name for name in tensors if "_proj" in name]:
        weight = tensors[name]
        blocks = torch.stack([part.abs().amax() for part in blocks_of(weight)]).view(weight.shape[0] // BLOCK, -1)
        factors = blocks / 448
        spread = factors.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        tensors[name] = (weight / spread).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = factors
        right[name] = tensors[name].float() * spread
    quantise(tmp_path, "fp8", tensors, weight_block_size=[BLOCK, BLOCK], activation_scheme="dynamic")
    base = prepare_base(str(tmp_path))
    model = load_weights(base, choose_hardware(), attention="eager")
    found = model.state_dict()
    for name, weight in right.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], weight, rtol=0, atol=0)
    assert not hasattr(model.config, "quantization_config")
    check_packed(base)
    check_served(base)


def blocks_of(weight: torch.Tensor) -> list[torch.Tensor]:
    return [part for rows in weight.split(BLOCK, 0) for part in rows.split(BLOCK, 1)]


def test_mxfp4(tmp_path):
    """gpt-oss': experts in blocks of 32 numbers of four bits, with one exponent each (arXiv 2310.10537)."""
    model = twin_of(write_base(tmp_path / "config", "gpt_oss"))
    save_twin(write_base(tmp_path / "config", "gpt_oss"), model, tmp_path / "whole")
    directory, chance = tmp_path / "whole", torch.Generator().manual_seed(0)
    tensors, right = load_file(directory / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, into, out = tensors.pop(name).shape
        shape = experts, out, into // 32
        packed = torch.randint(0, 256, (*shape, 16), generator=chance, dtype=torch.uint8)
        exponents = torch.randint(120, 127, shape, generator=chance, dtype=torch.uint8)
        tensors |= {f"{name}_blocks": packed, f"{name}_scales": exponents}
        values = torch.stack([FP4[(packed & 15).long()], FP4[(packed >> 4).long()]], dim=-1).flatten(-2)
        whole = values * torch.pow(2.0, exponents.float() - 127)[..., None]
        right[name] = whole.flatten(-2).transpose(1, 2)  # [experts, in, out], as the model has them
    quantise(directory, "mxfp4", tensors)
    base = prepare_base(str(directory))
    found = load_weights(base, choose_hardware(), attention="eager").state_dict()
    for name, weight in right.items():
        torch.testing.assert_close(found[name].float(), weight, rtol=0, atol=0)
    assert precision_of(base) == "mxfp4"
    numbers = sum(weight.numel() for weight in right.values())
    assert f"their {numbers:,} parameters stay frozen" in (
        describe_experts(weight_shapes(directory), AdapterConfig()) or ""
    )


@pytest.mark.parametrize("method", ["awq", "gptq", "compressed-tensors", "bitsandbytes"])
def test_others_are_refused_before_anything_is_loaded(method, tmp_path):
    write_tiny_model(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    quantise(tmp_path, method, load_file(tmp_path / "model.safetensors"))
    base = prepare_base(str(tmp_path))
    for check in (check_packed, check_served):
        with pytest.raises(UserError, match=f"is quantised by {method}; .* unquantised original, or .* vllm"):
            check(base)


def test_whole_weights_are_not_quantised_again(tmp_path):
    write_tiny_model(tmp_path)
    quantise(tmp_path, "fp8", load_file(tmp_path / "model.safetensors"))
    with pytest.raises(UserError, match="quantised by fp8, and cannot be quantised again to nf4"):
        load_weights(prepare_base(str(tmp_path)), choose_hardware(), attention="eager", quantize="nf4")
