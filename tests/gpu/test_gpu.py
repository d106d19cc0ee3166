"""The parity records on a GPU in bfloat16: looser, for 8 bits of mantissa (docs/benchmarks/gpu.md)."""

import pytest
import torch
from engine_contract import Reference, run
from tiny import VLLM_SIZES, chat_rows, write_jsonl, write_peft_adapter, write_tiny_model

from ftray.config.data import DataConfig
from ftray.config.serve import AdaptersConfig, EngineConfig
from ftray.data.examples import examples_of
from ftray.data.pack import pack
from ftray.data.tokens import tokenize_source
from ftray.infer.engines import load_adapter
from ftray.infer.protocol import Request, SamplingParams
from ftray.infer.torch_engine.engine import TorchEngine
from ftray.model.base import prepare_base
from ftray.model.hardware import choose_hardware
from ftray.model.packed import PackedCausalLM, register_packed_attention
from ftray.model.weights import load_weights

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CLOSE = {"rtol": 5e-2, "atol": 5e-2}


def test_packed_equals_one_by_one(tiny_base, renderer, tmp_path):
    hardware = choose_hardware()
    assert hardware.device.type == "cuda"
    path = write_jsonl(tmp_path / "d.jsonl", chat_rows(12, seed=3))
    dataset = tokenize_source("data.train", str(path), DataConfig(train=str(path)), renderer)
    model = PackedCausalLM(load_weights(tiny_base, hardware, attention=register_packed_attention()))
    with torch.no_grad():
        together = model(pack(examples_of(dataset, list(range(12)))).to(hardware.device))
        alone = torch.cat([model(pack(examples_of(dataset, [i])).to(hardware.device)) for i in range(12)])
    torch.testing.assert_close(together, alone, **CLOSE)


def check_mixed_batch(engine, base, adapters, renderer) -> None:
    """Log-probabilities of what adapters generate beside each other are PEFT's in float32."""
    for name, directory in adapters.items():
        load_adapter(engine, name, directory)
    names = list(adapters)
    prompts = [renderer.prompt_ids(row["messages"][:1]) for row in chat_rows(8, seed=4)]
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=0)
    wanted = [Request(str(i), p, sampling, names[i % len(names)]) for i, p in enumerate(prompts)]
    reference = Reference(base.directory, adapters)
    for (name, _), events in run(engine, wanted).items():
        request = wanted[int(name)]
        reported = torch.tensor([event.logprobs.chosen for event in events])
        ids = [*request.prompt_ids, *(event.token_id for event in events)]

        def expected(adapter, ids=ids, count=len(events)):
            rows = reference.log_probs(adapter, ids)[-count - 1 : -1]
            return rows.gather(1, torch.tensor(ids[-count:])[:, None])[:, 0]

        torch.testing.assert_close(reported, expected(request.adapter), **CLOSE)
        assert not torch.allclose(reported, expected(None), **CLOSE)  # the base's are told apart


def test_mixed_adapters_generate(tiny_base, adapters, renderer):
    config = EngineConfig(context_tokens=256, kv_cache_tokens=4096)
    engine = TorchEngine(tiny_base, choose_hardware(), config, AdaptersConfig(max_rank=64))
    check_mixed_batch(engine, tiny_base, adapters, renderer)


def test_mixed_adapters_generate_with_vllm(renderer, tmp_path):
    pytest.importorskip("vllm")
    from ftray.infer.vllm_engine.engine import VllmEngine

    directory = write_tiny_model(tmp_path / "wide", **VLLM_SIZES)
    base = prepare_base(str(directory))
    made = {
        f"r{rank}": write_peft_adapter(tmp_path / f"r{rank}", directory, rank=rank, seed=rank) for rank in (4, 8, 16)
    }
    config = EngineConfig(type="vllm", context_tokens=256, kv_cache_tokens=4096)
    engine = VllmEngine(base, choose_hardware(), config, AdaptersConfig(max_rank=16))
    try:
        check_mixed_batch(engine, base, made, renderer)
    finally:
        engine.close()


def test_training_in_bfloat16_follows_float32(tiny_base, tiny_model, train_file, tmp_path):
    from ranks import Record, train_on_ranks

    fixed = {"base_directory": str(tiny_model), "train_file": str(train_file)}
    records = [Record("gpu-z2", stage=2), Record("gpu-z3", stage=3)]
    results = train_on_ranks(1, records, tmp_path, backend="nccl", **fixed)
    assert results["gpu-z2"].losses == pytest.approx(results["gpu-z3"].losses, rel=5e-2)
    assert results["gpu-z2"].losses[-1] < results["gpu-z2"].losses[0]
