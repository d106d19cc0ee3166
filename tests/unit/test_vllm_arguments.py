"""What vLLM would be told, on machines that are not here. (What it does with it: tests/vllm.)"""

import dataclasses

import pytest
import torch

from ftray.config.serve import AdaptersConfig, EngineConfig, ServeConfig
from ftray.errors import UserError
from ftray.infer.engines import check_engine
from ftray.infer.vllm_engine.arguments import linear_shapes, slot_bytes, slots_within, vllm_arguments
from ftray.model.hardware import Hardware
from ftray.serve.replica.resources import replica_resources

H100 = Hardware(torch.device("cuda", 0), torch.bfloat16, "nccl", "as if")


def test_a_base_shared_by_four_gpus(tiny_base):
    config = EngineConfig(type="vllm", tensor_parallel=4, kv_cache_tokens=65536, context_tokens=4096)
    reported = vllm_arguments(tiny_base, H100, config, num_slots=8, max_rank=48)
    assert reported["tensor_parallel_size"] == 4
    assert reported["distributed_executor_backend"] == "ray"
    assert reported["dtype"] == "bfloat16"
    assert (reported["num_gpu_blocks_override"] - 1) * reported[
        "block_size"
    ] == 65536  # vLLM keeps one block for itself
    assert reported["max_lora_rank"] == 64  # the next rank it has slots for
    assert not reported["enforce_eager"]


def test_replicas_that_share_a_gpu_leave_each_other_room(tiny_base):
    half = dataclasses.replace(H100, gpu_share=0.5)
    reported = [
        vllm_arguments(tiny_base, hardware, EngineConfig(type="vllm"), num_slots=8, max_rank=16)
        for hardware in (H100, half)
    ]
    assert [each["gpu_memory_utilization"] for each in reported] == [0.9, 0.45]


def test_a_gpu_without_bfloat16_is_refused(tiny_base):
    old = Hardware(torch.device("cuda", 0), torch.float32, "nccl", "Tesla V100 has no bfloat16")
    with pytest.raises(
        UserError, match=r"adapters in 16 bits on a GPU, but Tesla V100 has no bfloat16; use type: torch"
    ):
        vllm_arguments(tiny_base, old, EngineConfig(type="vllm"), num_slots=8, max_rank=16)


def serve_config(**engine) -> dict:
    return {"kind": "serve", "base_model": "smollm2-135m", "engine": {"type": "vllm", **engine}}


def test_gpus_that_share_the_base_are_one_placement_group():
    def resources(engine: dict, **replicas) -> dict:
        return replica_resources(ServeConfig.model_validate(serve_config(**engine) | {"replicas": replicas}))

    shared = resources({"tensor_parallel": 4}, gpus_each=4, cpus_each=3)
    assert shared["placement_group_bundles"] == [{"CPU": 3, "GPU": 1}, {"GPU": 1}, {"GPU": 1}, {"GPU": 1}]
    assert shared["placement_group_strategy"] == "STRICT_PACK"
    assert shared["ray_actor_options"] == {
        "num_cpus": 3,
        "num_gpus": pytest.approx(0.1),
    }
    assert resources({}, gpus_each=1) == {"ray_actor_options": {"num_cpus": 1, "num_gpus": 1}}
    with pytest.raises(ValueError, match=r"replicas\.gpus_each must be 4 \(it is 0\)"):
        ServeConfig.model_validate(serve_config(tensor_parallel=4))
    with pytest.raises(ValueError, match=r"adapters\.dtype: bfloat16 needs engine\.type torch"):
        ServeConfig.model_validate(serve_config() | {"adapters": {"dtype": "bfloat16"}})
    with pytest.raises(ValueError, match=r"engine\.tensor_parallel: 4 needs engine\.type vllm"):
        ServeConfig.model_validate(serve_config(tensor_parallel=4, type="torch"))


def test_slots_are_counted_by_bytes_padded_to_the_rank(tiny_base):
    shapes = linear_shapes(tiny_base)
    per_rank = sum(into + out for name, (into, out) in shapes.items() if ".layers." in name) * 2
    room = AdaptersConfig(max_rank=16, device_budget=f"{5 * 16 * per_rank}B")
    assert slots_within(room, slot_bytes(16, shapes, bytes_per_weight=2)) == 5
    with pytest.raises(UserError, match=r"adapters\.device_budget: one slot of rank 256 takes"):
        slots_within(AdaptersConfig(max_rank=250, device_budget="1KiB"), slot_bytes(250, shapes, bytes_per_weight=2))
    with pytest.raises(UserError, match=r"adapters\.max_rank: 600 is over what vLLM has slots for"):
        slot_bytes(600, shapes, bytes_per_weight=2)


def test_vllm_that_is_not_installed_is_said_before_ray_starts():
    with pytest.raises(UserError, match=r"engine\.type: vllm is not installed; pip install 'ftray\[vllm\]'"):
        check_engine(EngineConfig(type="vllm"))


def test_a_cache_that_nobody_sizes_fills_the_gpus_share(tiny_base):
    reported = vllm_arguments(tiny_base, H100, EngineConfig(type="vllm"), num_slots=8, max_rank=16)
    assert "num_gpu_blocks_override" not in reported
    cpu = Hardware(torch.device("cpu"), torch.float32, "gloo", "no GPU")
    assert "num_gpu_blocks_override" in vllm_arguments(
        tiny_base, cpu, EngineConfig(type="vllm"), num_slots=8, max_rank=16
    )


@pytest.mark.parametrize("method", ["awq", "gptq", "compressed-tensors", "fp8"])
def test_slots_of_quantised_bases_are_as_large_as_of_whole_ones(tiny_base, tmp_path, method):
    """Their files have packed weights: nothing of two dimensions, or something of other sizes."""
    import json
    import shutil

    from ftray.model.base import prepare_base

    copy = shutil.copytree(tiny_base.directory, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
    shapes = linear_shapes(prepare_base(str(copy)))
    whole = {name: shape for name, shape in linear_shapes(tiny_base).items() if ".layers." in name}
    assert shapes == whole
    assert slot_bytes(16, shapes, bytes_per_weight=2) == slot_bytes(16, whole, bytes_per_weight=2) > 0


def test_slots_are_as_large_as_what_is_published(tiny_base, adapters, tmp_path):
    from ftray.artifacts.publish import publish_adapter
    from ftray.registry import Registry
    from ftray.serve.replica.versions import with_rank

    registry = Registry(str(tmp_path / "registry"))
    vllm, limits = EngineConfig(type="vllm"), AdaptersConfig(registry=str(tmp_path / "registry"))
    assert with_rank(limits, vllm, registry).max_rank == 16
    publish_adapter(registry, "small", adapters["r4"])
    assert with_rank(limits, vllm, registry).max_rank == 16
    from tiny import write_peft_adapter

    large = write_peft_adapter(tmp_path / "r32", tiny_base.directory, rank=32, seed=0)
    publish_adapter(registry, "large", large)
    assert with_rank(limits, vllm, registry).max_rank == 32
    assert with_rank(limits, EngineConfig(), registry) == limits
    assert limits.rank_limit == 256
    given = AdaptersConfig(max_rank=8)
    assert with_rank(given, vllm, registry) == given
