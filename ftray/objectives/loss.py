"""What an objective takes and returns. The engine divides once, by the count over all ranks and micro-batches.

Shapes: N targets in the row, S sequences in it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor


@dataclass(frozen=True)
class LogProbs:
    """log p of every target [N], float32: under the model, and under the frozen reference where it is needed."""

    policy_N: Tensor
    reference_N: Tensor | None = None


class Row(Protocol):
    """What an objective reads of a packed row."""

    @property
    def weights_N(self) -> Tensor: ...

    @property
    def sequences_N(self) -> Tensor:
        """Which sequence of the row each target belongs to."""
        ...

    @property
    def num_sequences(self) -> int: ...


@dataclass(frozen=True)
class Loss:
    sum: Tensor  # scalar, differentiable
    count: Tensor  # scalar: what the sum is a sum over
    metrics: dict[str, Tensor] = field(default_factory=dict)  # sums over the same, for metrics.jsonl


@dataclass(frozen=True)
class Objective:
    loss: Callable[[LogProbs, Row], Loss]
    unit: Literal["token", "example"] = "token"  # what the step's loss is a mean over
    needs_reference: bool = False
