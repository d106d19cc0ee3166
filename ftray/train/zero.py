"""What is particular to DeepSpeed ZeRO: its settings, and reading and writing sharded optimizer state.

Every rank calls these functions with the same parameters in the same order: stages 1 to 3 communicate in them.
"""

from collections.abc import Iterable
from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor, nn

from ftray.model.hardware import Hardware

MOMENTS = ("exp_avg", "exp_avg_sq")
# Communication buckets are allocated whole; DeepSpeed's default of 5e8 elements is 2 GB for a 5 MB adapter.
MAX_BUCKET_ELEMENTS = 50_000_000


def skip_unused_builds() -> None:
    """On CPU DeepSpeed compiles a shared-memory all-reduce at start, for tensor-parallel inference alone: half a minute
    and a compiler, for something that training never calls."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def zero_settings(stage: int, hardware: Hardware, *, max_grad_norm: float, num_trainable: int) -> dict[str, Any]:
    bucket = max(1_000_000, min(MAX_BUCKET_ELEMENTS, num_trainable))
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # The number of micro-batches varies from step to step: N backwards, then one step that is the boundary.
        "managed_gradient_accumulation": False,
        # Stage 0 in float32 neither reports nor keeps the norm; the engine clips there by itself.
        "gradient_clipping": max_grad_norm if stage > 0 else 0.0,
        "bf16": {"enabled": hardware.dtype == torch.bfloat16},
        # Gradients of many micro-batches add up in float32; stage 1 would need another optimizer class for it.
        "data_types": {"grad_accum_dtype": "fp32" if stage >= 2 or hardware.dtype == torch.float32 else None},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": stage == 2 and hardware.device.type == "cuda",
            "contiguous_gradients": True,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "stage3_prefetch_bucket_size": bucket,
            "stage3_param_persistence_threshold": 100_000,
        },
    }


def shard_while_loading(stage: int, hardware: Hardware) -> Any:
    """ZeRO-3: `from_pretrained` splits each weight over the ranks as it reads it, while the returned object lives."""
    if stage < 3:
        return None
    from transformers.integrations import HfDeepSpeedConfig

    return HfDeepSpeedConfig(zero_settings(stage, hardware, max_grad_norm=1.0, num_trainable=MAX_BUCKET_ELEMENTS))


def full_parameter(parameter: nn.Parameter) -> Tensor:
    """The whole float32 value on every rank."""
    if not is_sharded(parameter):
        return parameter.detach().float()
    value = safe_get_full_fp32_param(parameter)
    assert value is not None
    return value.reshape(full_shape(parameter))


def full_moment(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, key: str) -> Tensor:
    if not is_sharded(parameter):
        return optimizer.state[parameter][key]
    value = safe_get_full_optimizer_state(parameter, key)
    assert value is not None
    return value.reshape(full_shape(parameter))


def link_moments(engine: Any) -> None:
    """Stages 1 and 2 find a parameter's slice of the moments through links. DeepSpeed makes them after stepping the
    first parameter group, when those of the other groups do not exist yet: so make them again."""
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def restore_state(engine: Any, state: Iterable[tuple[nn.Parameter, dict[str, Tensor]]], *, step: int) -> None:
    """Puts weights and AdamW moments back. `state`: (parameter, {"master" or a moment: full float32 tensor})."""
    optimizer: torch.optim.Optimizer = engine.basic_optimizer
    for flat in flat_parameters(engine):
        # AdamW makes its state at the first step; here it must exist before.
        optimizer.state[flat] = {"step": torch.tensor(float(step))} | {key: torch.zeros_like(flat) for key in MOMENTS}
    link_moments(engine)
    for parameter, tensors in state:
        # The weight that computes, and, where it is another tensor, the float32 master that AdamW updates.
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
            parameter.copy_(tensors["master"])
        if is_sharded(parameter):
            safe_set_full_fp32_param(parameter, tensors["master"])
        for key in MOMENTS:
            if is_sharded(parameter):
                safe_set_full_optimizer_state(parameter, tensors[key], key)
            else:
                optimizer.state[parameter][key].copy_(tensors[key])


def flat_parameters(engine: Any) -> list[Tensor]:
    """What AdamW's state is keyed by: this rank's flat float32 partitions, or at stage 0 the parameters."""
    for owner in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):  # stages 1 and 2; stage 3
        if hasattr(engine.optimizer, owner):
            return getattr(engine.optimizer, owner)
    return [parameter for group in engine.basic_optimizer.param_groups for parameter in group["params"]]


def is_sharded(parameter: nn.Parameter) -> bool:
    """By ZeRO-3 (`ds_id`), or its optimizer state by stages 1 and 2 (`_hp_mapping`, None where another rank has it)."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def full_shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)
