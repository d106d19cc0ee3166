"""What a run needs of each GPU's memory."""

from dataclasses import dataclass

from ftray.config import RunConfig
from ftray.model.heads import LOGIT_ROWS
from ftray.objectives import objective_of
from ftray.plan.gpus import Gpu
from ftray.plan.model_size import ModelSize, frozen_bytes
from ftray.train.engine.stages import bucket_elements

LIVE_ELEMENTS = 1_000_000_000  # DeepSpeed's stage3_max_live_parameters and stage3_max_reuse_distance
USABLE = 0.95  # of a GPU's memory: the allocator cannot use the rest


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU (or of one worker's process) at its peak."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    buffers: float  # DeepSpeed's, gathered weights of ZeRO-3, temporaries of a layer's backward
    context: float  # CUDA and NCCL
    host: float  # of host memory, for what is offloaded; not in the total

    @property
    def parts(self) -> dict[str, float]:
        return {name: value for name, value in vars(self).items() if name != "host"}

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    def fits(self, gpu: Gpu) -> bool:
        return self.total <= USABLE * gpu.memory_gib * 2**30


def plan_memory(config: RunConfig, size: ModelSize, gpu: Gpu, *, workers: int) -> Memory:
    stage, offload = config.zero.stage, config.zero.offload == "cpu"
    width = gpu.bytes_per_weight
    tokens = config.batch.tokens_per_micro_batch / config.memory.sequence_parallel
    shards = workers if stage == 3 else 1
    sharded = workers if stage > 0 else 1
    weights = (frozen_bytes(size, bytes_per_weight=width) + size.trained * width) / shards
    gradients = size.trained * {0: width, 1: width, 2: 4 / workers, 3: 4 / workers}[stage]
    moments = 8 if config.optimizer.type == "adamw" else 2 + 8 / 256
    optimizer = size.trained * (moments + (4 if stage > 0 else 0)) / sharded
    bucket = bucket_elements(size.trained) * width
    buffers = size.widest_bytes_per_token * tokens * 3  # gradients of a layer's inner activations
    if stage in (1, 2):
        buffers += bucket * (2 if stage == 2 and gpu.dtype == "bfloat16" else 1)
    if stage == 3:
        live = min(size.total, max(LIVE_ELEMENTS, 2 * size.layer))
        buffers += bucket + live * width
    # A frozen copy, which is not offloaded.
    reference = objective_of(config.objective).needs_reference and config.adapter is None
    host = 0.0
    if offload:
        host, optimizer = optimizer + size.trained * 4 / sharded, 0.0  # gradients go there too
        gradients = gradients if stage < 2 else 0.0
        if stage == 3:
            host, weights = host + weights, 0.0
    logits = min(tokens, LOGIT_ROWS) * size.vocabulary * (12 + (width if width < 4 else 0))
    if config.memory.activation_checkpointing:  # gone before the first layer is computed again
        logits = max(0.0, logits - one_layer_bytes(size, tokens))
    return Memory(
        weights=weights + (size.total * width / shards if reference else 0.0),
        gradients=gradients,
        optimizer=optimizer,
        activations=activation_bytes(config, size, width, tokens),
        logits=logits,
        buffers=buffers,
        context=gpu.context_gib * 2**30,
        host=host,
    )


def one_layer_bytes(size: ModelSize, tokens: float) -> float:
    return size.layer_bytes_per_token * tokens + size.layer_bytes


def activation_bytes(config: RunConfig, size: ModelSize, width: int, tokens: float) -> float:
    one_layer = one_layer_bytes(size, tokens)
    around = size.outer_bytes_per_token * tokens
    if config.memory.activation_checkpointing:
        return size.num_layers * size.hidden * width * tokens + one_layer + around
    return size.num_layers * one_layer + around
