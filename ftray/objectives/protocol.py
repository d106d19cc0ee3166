"""What an objective is: its section of a config, its loss, and what it needs. The engine divides a step's loss once, by
the count over all ranks and micro-batches.

An objective's module is read wherever a config is, so torch loads only when its loss is made. Shapes: N targets in the
row, S sequences in it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ftray.schema import Strict

if TYPE_CHECKING:
    from torch import Tensor

# What a row of data becomes (data/encode.py): a conversation or a document is one sequence, a pair is two.
Shape = Literal["conversation", "document", "pair"]
SEQUENCES = {"conversation": 1, "document": 1, "pair": 2}


@dataclass(frozen=True)
class TrainedTurns:
    """Which of a conversation's answers are trained, and whether their thoughts are."""

    on: Literal["all", "last", "by_weight"] = "all"
    reasoning: bool = True


@dataclass(frozen=True)
class LogProbs:
    """log p of every target [N], float32: under the model, and under the frozen reference where it is needed."""

    policy_N: "Tensor"
    reference_N: "Tensor | None" = None


class Row(Protocol):
    """What an objective reads of a packed row."""

    @property
    def weights_N(self) -> "Tensor": ...

    @property
    def sequences_N(self) -> "Tensor":
        """Which sequence of the row each target belongs to."""
        ...

    @property
    def num_sequences(self) -> int: ...

    @property
    def extras(self) -> "Mapping[str, Tensor]":
        """By name: `..._N` has a value for each target, `..._S` for each sequence; what its source gives."""
        ...


@dataclass(frozen=True)
class Loss:
    sum: "Tensor"  # scalar, differentiable
    count: "Tensor"  # scalar: what the sum is a sum over
    metrics: "dict[str, Tensor]" = field(default_factory=dict)  # sums over the same, for metrics.jsonl


LossFunction = Callable[[LogProbs, Row], Loss]


@dataclass(frozen=True)
class Objective:
    """`config`: the section that its `type` names; `loss`: from that section to pure tensor maths."""

    config: type[Strict]
    loss: Callable[[Any], LossFunction]
    shape: Shape
    unit: Literal["token", "example"] = "token"  # what the step's loss is a mean over
    needs_reference: bool = False  # log-probabilities under a frozen reference
    head: str = "causal_lm"  # of model/heads, or module:NAME of a `Head` of one's own

    @property
    def sequences_per_example(self) -> int:
        return SEQUENCES[self.shape]
