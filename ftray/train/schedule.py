"""Learning-rate schedules: a factor of the peak rate, by step."""

import math
from collections.abc import Callable

from ftray.config.run import OptimizerConfig

SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}


def make_schedule(config: OptimizerConfig, *, num_steps: int) -> Callable[[int], float]:
    """Linear warm-up to the peak, then the shape down to the last step (Loshchilov & Hutter 2017, arXiv 1608.03983)."""
    shape = SHAPES[config.schedule]
    warmup = config.warmup_steps

    def learning_rate(step: int) -> float:
        if step < warmup:
            return config.learning_rate * (step + 1) / warmup
        return config.learning_rate * shape((step - warmup) / max(1, num_steps - warmup))

    return learning_rate
