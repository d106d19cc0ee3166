"""`ftray plan`: what a run needs of each GPU, how long a step takes, and what fits, before a GPU is touched.

Memory is counted part by part from the real modules (`plan/counting.py`) and from how ftray's engine uses DeepSpeed;
tests/parity/test_memory.py compares it with measured peaks. Time is FLOPs over a share of the chip's rate and bytes
over its links: good for comparing settings, not for promises.
"""

import itertools
from dataclasses import dataclass

from pydantic import ValidationError

from ftray.config import RunConfig
from ftray.objectives import objective_of
from ftray.plan.gpus import Gpu
from ftray.plan.memory import Memory, plan_memory
from ftray.plan.model_size import ModelSize

MICRO_BATCH_STEP = 256  # tokens, in the search for the largest that fits
HOST_LINK_GB_S = 25.0  # PCIe, for offloaded optimizer state
HOST_MEMORY_GB_S = 10.0  # a worker's share of what AdamW on the host reads and writes


@dataclass(frozen=True)
class Work:
    """What a step has to do."""

    examples: int
    tokens_per_example: float
    trained_share: float = 1.0  # of the tokens
    sequences_per_example: int = 1

    @property
    def tokens(self) -> float:
        return self.examples * self.tokens_per_example


@dataclass(frozen=True)
class Option:
    """One way to run, and what it costs."""

    config: RunConfig
    memory: Memory
    fits: bool
    step_s: float

    @property
    def settings(self) -> list[str]:
        config = self.config
        return [
            f"zero.stage={config.zero.stage}",
            f"zero.offload={config.zero.offload}",
            f"memory.activation_checkpointing={str(config.memory.activation_checkpointing).lower()}",
            f"batch.tokens_per_micro_batch={config.batch.tokens_per_micro_batch}",
        ]


def plan_option(
    config: RunConfig, size: ModelSize, gpu: Gpu, work: Work, *, workers: int, per_node: int, mfu: float
) -> Option:
    memory = plan_memory(config, size, gpu, workers=workers)
    seconds = step_seconds(config, size, gpu, work, workers=workers, per_node=per_node, mfu=mfu)
    return Option(config, memory, memory.fits(gpu), seconds)


def step_seconds(
    config: RunConfig, size: ModelSize, gpu: Gpu, work: Work, *, workers: int, per_node: int, mfu: float
) -> float:
    """The longer of computing at `mfu` of the chip's rate and of moving weights and gradients, which overlap; plus what
    happens once a step."""
    stage, width = config.zero.stage, gpu.bytes_per_weight
    shares = workers / config.memory.sequence_parallel
    micro_batches = max(1.0, -(-work.tokens / shares // config.batch.tokens_per_micro_batch))
    length = work.tokens_per_example / work.sequences_per_example
    counts = {
        "num_tokens": int(work.tokens),
        "num_trained": int(work.tokens * work.trained_share),
        "lengths": {length: work.tokens / length},
    }
    reference = objective_of(config.objective).needs_reference
    flops = size.flops.step(**counts, trains_base=config.adapter is None, reference=reference)
    if config.memory.activation_checkpointing:
        flops += size.flops.forward(**counts)
    compute = flops / (workers * gpu.tflops * 1e12 * mfu)
    link = (gpu.link_gb_s if workers <= per_node else gpu.network_gb_s) * 1e9
    gathered = 2 * size.total * width if stage == 3 else 0.0
    reduced = size.trained * width if stage >= 2 else 0.0
    swapped = 0.0
    if config.memory.sequence_parallel > 1:  # query, key, value and output, forward and twice backward
        swapped = 12 * size.num_layers * size.hidden * width * work.tokens / workers / micro_batches
    moved = micro_batches * (gathered + reduced + swapped) * (workers > 1) / link
    once = (0.0 if workers == 1 else size.trained * width * (2 if stage < 2 else 1)) / link
    if config.zero.offload == "cpu":
        own = size.trained / workers
        once += own * 2 * width / (HOST_LINK_GB_S * 1e9) + own * 28 / (HOST_MEMORY_GB_S * 1e9)
    return max(compute, moved) + once


def options(
    config: RunConfig, size: ModelSize, gpu: Gpu, work: Work, *, workers: int, per_node: int, mfu: float
) -> list[Option]:
    """Every stage, offload and activation checkpointing, each with the largest micro-batch that fits, or, where none
    does, with the smallest there can be."""
    stages = (0, 1, 2, 3) if gpu.dtype == "float32" else (1, 2, 3)
    found = []
    for stage, offload, checkpointing in itertools.product(stages, ("none", "cpu"), (False, True)):
        changed = changed_config(config, stage=stage, offload=offload, checkpointing=checkpointing)
        if changed is not None:
            tokens = largest_micro_batch(changed, size, gpu, work, workers=workers)
            changed = with_micro_batch(changed, tokens or config.longest_example)
            found.append(plan_option(changed, size, gpu, work, workers=workers, per_node=per_node, mfu=mfu))
    return found


def cheapest(found: list[Option]) -> Option | None:
    return min((option for option in found if option.fits), key=lambda option: option.step_s, default=None)


def changed_config(config: RunConfig, *, stage: int, offload: str, checkpointing: bool) -> RunConfig | None:
    """None where the settings do not go together."""
    settings = config.model_dump()
    settings["zero"] |= {"stage": stage, "offload": offload}
    settings["memory"]["activation_checkpointing"] = checkpointing
    try:
        return RunConfig.model_validate(settings)
    except ValidationError:
        return None


def with_micro_batch(config: RunConfig, tokens: int) -> RunConfig:
    return config.model_copy(update={"batch": config.batch.model_copy(update={"tokens_per_micro_batch": tokens})})


def largest_micro_batch(config: RunConfig, size: ModelSize, gpu: Gpu, work: Work, *, workers: int) -> int | None:
    """No larger than a worker's share of a step; None where not even one example fits."""

    def fits(tokens: int) -> bool:
        return plan_memory(with_micro_batch(config, tokens), size, gpu, workers=workers).fits(gpu)

    low = config.longest_example
    if not fits(low):
        return None
    share = work.tokens * config.memory.sequence_parallel / workers
    high = max(low, int(-(-share // MICRO_BATCH_STEP)) * MICRO_BATCH_STEP)
    steps = (high - low) // MICRO_BATCH_STEP
    while steps > 0 and not fits(low + steps * MICRO_BATCH_STEP):
        steps -= 1 + steps // 8
    return low + max(0, steps) * MICRO_BATCH_STEP
