"""What vLLM is told, from the config. No vllm here."""

from typing import Any

import torch

from ftray.config.engines import ENGINES
from ftray.config.serve import AdaptersConfig, EngineConfig
from ftray.errors import UserError
from ftray.model.adapters.linear import linear_modules
from ftray.model.base import BaseModel
from ftray.model.hardware import Hardware
from ftray.model.weight_files import weight_shapes
from ftray.model.weights import model_without_weights
from ftray.storage import read_json

# vLLM counts adapters in memory, not bytes; ftray's residency keeps the bytes, and this must not evict before it does.
MAX_HOST_ADAPTERS = 10_000
# More make every step slower, used or not.
MAX_SLOTS = 64
WORKER_GPUS = str(ENGINES["vllm"].gpus_per_worker)
# Of its share of a GPU's memory, what vLLM may take; of that only the cache that `kv_cache_tokens` asks for, if set.
GPU_MEMORY = 0.9
# The ranks that vLLM has slots for.
SLOT_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def vllm_arguments(
    base: BaseModel, hardware: Hardware, config: EngineConfig, *, num_slots: int, max_rank: int
) -> dict[str, Any]:
    """Of `vllm.AsyncEngineArgs`."""
    on_gpu = hardware.device.type == "cuda"
    if on_gpu and hardware.dtype == torch.float32:
        raise UserError(f"engine.type: vllm has adapters in 16 bits on a GPU, but {hardware.reason}; use type: torch")
    block_tokens = 16 if on_gpu else 32  # the smallest that its kernels take
    blocks = -(-config.kv_cache_tokens // block_tokens) + 1  # it keeps one for itself
    fills_memory = on_gpu and config.kv_cache_tokens == EngineConfig.model_fields["kv_cache_tokens"].default
    return {
        "model": str(base.directory),
        "dtype": hardware.dtype_name,
        "max_model_len": config.context_tokens,
        "max_num_seqs": config.max_sequences,
        "max_num_batched_tokens": config.max_prefill_tokens + config.max_sequences,
        "block_size": block_tokens,
        **({} if fills_memory else {"num_gpu_blocks_override": blocks}),
        "enable_prefix_caching": True,
        "enable_chunked_prefill": True,
        "enable_lora": True,
        "max_loras": num_slots,
        "max_cpu_loras": max(num_slots, MAX_HOST_ADAPTERS),
        "max_lora_rank": slot_rank(max_rank),
        "structured_outputs_config": {"backend": "guidance", "disable_any_whitespace": True},
        "tensor_parallel_size": config.tensor_parallel,
        # Workers in the bundles of the replica's placement group.
        **({"distributed_executor_backend": "ray"} if config.tensor_parallel > 1 else {}),
        "enforce_eager": not on_gpu,
        # On a CPU vLLM would refuse to start unless nearly all memory is free, though the cache's size is given above.
        "gpu_memory_utilization": GPU_MEMORY * hardware.gpu_share if on_gpu else 0.2,
        "enable_log_requests": False,
    }


def linear_shapes(base: BaseModel) -> dict[str, tuple[int, int]]:
    """(in, out) of every linear layer, by module name: of the 2-D weights in the base's files; of a quantised base,
    whose files have packed ones, as its config says."""
    if "quantization_config" in read_json(base.directory / "config.json"):
        return shapes_by_config(base)
    directory = base.directory
    return {
        name.removesuffix(".weight"): (shape[1], shape[0])
        for name, shape in weight_shapes(directory).items()
        if name.endswith(".weight") and len(shape) == 2
    }


def shapes_by_config(base: BaseModel) -> dict[str, tuple[int, int]]:
    layers: dict[str, Any] = linear_modules(model_without_weights(base))
    return {name: (layer.weight.shape[1], layer.weight.shape[0]) for name, layer in layers.items()}


def slot_rank(max_rank: int) -> int:
    if max_rank > SLOT_RANKS[-1]:
        raise UserError(f"adapters.max_rank: {max_rank} is over what vLLM has slots for ({SLOT_RANKS[-1]}); lower it")
    return next(rank for rank in SLOT_RANKS if rank >= max_rank)


def slot_bytes(max_rank: int, shapes: dict[str, tuple[int, int]], *, bytes_per_weight: int) -> int:
    """Of one adapter on the device, whatever its own rank: vLLM's slots are padded to theirs on every layer."""
    layers = [shape for name, shape in shapes.items() if ".layers." in name]
    return bytes_per_weight * slot_rank(max_rank) * sum(into + out for into, out in layers)


def slots_within(adapters: AdaptersConfig, bytes_each: int) -> int:
    """How many adapters `device_budget` has room for."""
    num_slots = adapters.device_budget // bytes_each
    if num_slots == 0:
        raise UserError(
            f"adapters.device_budget: one slot of rank {slot_rank(adapters.rank_limit)} takes {bytes_each:,} bytes in "
            f"vLLM, over the budget of {adapters.device_budget:,}; raise it or lower adapters.max_rank"
        )
    return min(num_slots, MAX_SLOTS)
