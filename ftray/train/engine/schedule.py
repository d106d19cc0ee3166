"""Learning-rate schedules: a factor of the peak rate, by step."""

import math
from collections.abc import Callable

from ftray.config.run import OptimizerConfig


def shapes(config: OptimizerConfig) -> dict[str, Callable[[float], float]]:
    """By the share of the steps after the warm-up that is done."""
    tail = config.decay_fraction
    return {
        "constant": lambda progress: 1.0,
        "linear": lambda progress: 1.0 - progress,
        "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
        # Hu et al. 2024 (MiniCPM, arXiv 2404.06395), with the linear decay of Hägele et al. 2024 (arXiv 2405.18392)
        "warmup_stable_decay": lambda progress: min(1.0, (1.0 - progress) / tail),
    }


def make_schedule(config: OptimizerConfig, *, num_steps: int) -> Callable[[int], float]:
    """Linear warm-up to the peak, then the shape down to the last step (Loshchilov & Hutter 2017, arXiv 1608.03983)."""
    shape = shapes(config)[config.schedule]
    warmup = config.warmup_steps

    def learning_rate(step: int) -> float:
        if step < warmup:
            return config.learning_rate * (step + 1) / warmup
        return config.learning_rate * shape((step - warmup) / max(1, num_steps - warmup))

    return learning_rate
