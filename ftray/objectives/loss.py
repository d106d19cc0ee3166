"""What an objective returns. The engine divides once, by the count over all ranks and micro-batches of a step."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Loss:
    sum: Tensor  # scalar, differentiable
    count: Tensor  # scalar: what the sum is a sum over


# (log-probabilities of the targets [N] float32, weights [N]) -> Loss
Objective = Callable[[Tensor, Tensor], Loss]
