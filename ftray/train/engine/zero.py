"""What is particular to DeepSpeed ZeRO: its settings, and reading and writing sharded optimizer state.

Every stage cuts a parameter over the ranks in another way; here each way becomes a range of the flattened parameter.
"""

from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from ftray.config.run import ZeroConfig
from ftray.model.hardware import Hardware
from ftray.train.engine.stages import MAX_BUCKET_ELEMENTS, bucket_elements
from ftray.train.engine.state import MASTER, MOMENTS, ShardedState

# DeepSpeed compiles a shared-memory all-reduce where its communication begins on a CPU (at ZeRO-3 while the weights are
# loaded), for tensor-parallel inference alone: half a minute and a compiler, for what training never calls.
setattr(deepspeed.ops, "__compatible_ops__", {})  # noqa: B010  a name that its type does not have


def zero_settings(
    config: ZeroConfig, hardware: Hardware, *, max_grad_norm: float, num_trainable: int
) -> dict[str, Any]:
    stage = config.stage
    bucket = bucket_elements(num_trainable)
    on_gpu = hardware.device.type == "cuda"
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": stage == 2 and on_gpu,
        "contiguous_gradients": True,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "stage3_prefetch_bucket_size": bucket,
        "stage3_param_persistence_threshold": 100_000,
    }
    if config.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
        if stage == 3:
            zero["offload_param"] = {"device": "cpu", "pin_memory": on_gpu}
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
        # With offload DeepSpeed would insist on its own CPU Adam, and compile it.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "zero_optimization": zero | config.settings,
    }


def shard_while_loading(config: ZeroConfig, hardware: Hardware) -> Any:
    """ZeRO-3: `from_pretrained` splits each weight over the ranks as it reads it, while the returned object lives."""
    if config.stage < 3:
        return None
    from transformers.integrations import HfDeepSpeedConfig

    return HfDeepSpeedConfig(zero_settings(config, hardware, max_grad_norm=1.0, num_trainable=MAX_BUCKET_ELEMENTS))


def freeze(model: nn.Module, settings: dict[str, Any], *, stage: int) -> nn.Module:
    """A model that only looks. With ZeRO-3 its weights are sharded like the others and need DeepSpeed's hooks."""
    model.eval().requires_grad_(False)
    if stage < 3:
        return model
    zero = {"stage": 3} | {k: v for k, v in settings["zero_optimization"].items() if k.startswith("stage3")}
    engine, *_ = deepspeed.initialize(model=model, config={**settings, "zero_optimization": zero})
    return engine


@dataclass(frozen=True)
class Fragment:
    """This rank's range of one flattened parameter: its float32 master and AdamW moments, [n] each."""

    start: int
    tensors: dict[str, Tensor]  # "master" and the moments


def local_fragment(engine: Any, parameter: nn.Parameter) -> Fragment | None:
    """What this rank owns of it, or None. Together the ranks' fragments are the whole parameter. No communication."""
    if is_partitioned(parameter):
        start, count = partition_of(parameter)
        if count == 0:
            return None
        state: dict[str, Any] = {MASTER: safe_get_local_fp32_param(parameter)}
        state |= {key: safe_get_local_optimizer_state(parameter, key) for key in MOMENTS}
        return Fragment(start, {key: value[:count] for key, value in state.items()})
    if hasattr(parameter, "_hp_mapping"):
        mapping: Any = getattr(parameter, "_hp_mapping")  # noqa: B009  DeepSpeed's own
        if mapping is None:
            return None  # other ranks own it
        state = {MASTER: mapping.get_hp_fragment()} | {key: mapping.get_hp_fragment(key) for key in MOMENTS}
        return Fragment(mapping.lp_fragment_address.start, state)
    # Stage 0: whole on every rank; each answers for an equal share, so that saving is shared.
    size = -(-parameter.numel() // dist.get_world_size())
    part = slice(dist.get_rank() * size, (dist.get_rank() + 1) * size)
    whole = {MASTER: parameter.detach()} | {key: engine.basic_optimizer.state[parameter][key] for key in MOMENTS}
    state = {key: value.flatten()[part] for key, value in whole.items()}
    return Fragment(part.start, state) if len(state[MASTER]) else None


@torch.no_grad()
def restore_state(engine: Any, parameters: dict[str, nn.Parameter], saved: ShardedState, *, step: int) -> None:
    """Weights and AdamW moments as any stage and world size saved them. No communication."""
    optimizer: torch.optim.Optimizer = engine.basic_optimizer
    for flat in flat_parameters(engine):
        # AdamW makes its state at the first step; here it must exist before.
        optimizer.state[flat] = {"step": torch.tensor(float(step))} | {key: torch.zeros_like(flat) for key in MOMENTS}
    link_moments(engine)
    for name, parameter in parameters.items():
        if is_partitioned(parameter):
            restore_partition(parameter, name, saved)
            continue
        # The weight that computes is whole on every rank; the float32 master, where it is another tensor, is not.
        parameter.copy_(saved.whole(MASTER, name))
        if hasattr(parameter, "_hp_mapping"):
            fragment = local_fragment(engine, parameter)
            if fragment is not None:
                for key, value in fragment.tensors.items():
                    value.copy_(saved.read(key, name, fragment.start, fragment.start + len(value)))
        else:
            for key in MOMENTS:
                optimizer.state[parameter][key].copy_(saved.whole(key, name))


def restore_partition(parameter: Any, name: str, saved: ShardedState) -> None:
    start, count = partition_of(parameter)

    def padded(kind: str) -> Tensor:
        value = torch.zeros(parameter.ds_tensor.ds_numel)
        value[:count] = saved.read(kind, name, start, start + count)
        return value

    if parameter.ds_status != deepspeed.zero.partition_parameters.ZeroParamStatus.NOT_AVAILABLE:
        parameter.partition(has_been_updated=False)  # a gathered copy would keep the old weights
    master = padded(MASTER)
    parameter.ds_tensor.data.copy_(master)
    safe_set_local_fp32_param(parameter, master)
    for key in MOMENTS:
        safe_set_local_optimizer_state(parameter, padded(key), key)


def partition_of(parameter: Any) -> tuple[int, int]:
    """(start, number of real elements) of this rank's ZeRO-3 partition; the last one is padded."""
    size = parameter.ds_tensor.ds_numel
    start = dist.get_rank() * size
    return start, max(0, min(size, parameter.ds_numel - start))


def full_parameter(parameter: nn.Parameter) -> Tensor:
    """The whole float32 value on every rank. A collective from stage 1 on."""
    if not is_partitioned(parameter) and not hasattr(parameter, "_hp_mapping"):
        return parameter.detach().float()
    value = safe_get_full_fp32_param(parameter)
    assert value is not None
    return value.reshape(full_shape(parameter))


def link_moments(engine: Any) -> None:
    """Stages 1 and 2 find a parameter's slice of the moments through links. DeepSpeed makes them after stepping the
    first parameter group, when those of the other groups do not exist yet: so make them again."""
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def flat_parameters(engine: Any) -> list[Tensor]:
    """What AdamW's state is keyed by: this rank's flat float32 partitions, or at stage 0 the parameters."""
    for owner in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):  # stages 1 and 2; stage 3
        if hasattr(engine.optimizer, owner):
            return getattr(engine.optimizer, owner)
    return [parameter for group in engine.basic_optimizer.param_groups for parameter in group["params"]]


def is_partitioned(parameter: nn.Parameter) -> bool:
    """By ZeRO-3. (At stages 1 and 2 `_hp_mapping` leads to the optimizer state.)"""
    return hasattr(parameter, "ds_id")


def full_shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)
