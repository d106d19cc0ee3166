"""What the loop, the checkpoints and the hooks know of a training engine. `deepspeed.py` is ours; tests have a fake.

Every verb is called on all ranks, at the same step and in the same order.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ftray.model.packed import PackedRow
from ftray.objectives import Loss, Objective
from ftray.train.engine.state import Shard, ShardedState
from ftray.train.step_record import FlopsMeter


@dataclass(frozen=True)
class StepLoss:
    """Means over a step or an evaluation, on every rank the same."""

    loss: float
    metrics: dict[str, float]

    def as_record(self) -> dict[str, float]:
        """Of an evaluation, as metrics.jsonl has it."""
        return {"eval_loss": self.loss} | {f"eval_{name}": value for name, value in self.metrics.items()}


def combined(found: Mapping[str, StepLoss], counts: Mapping[str, float]) -> StepLoss:
    """Means over several sources, by name, from the means of each, and the loss of each by itself. `counts`: what each
    source's means are over."""
    total = sum(counts[name] for name in found)

    def mean(value_of: Callable[[StepLoss], float]) -> float:
        return sum(value_of(loss) * counts[name] for name, loss in found.items()) / total

    shared = next(iter(found.values())).metrics
    metrics = {key: mean(lambda loss, key=key: loss.metrics[key]) for key in shared}
    of_sources = {f"loss/{name}": loss.loss for name, loss in found.items()}
    return StepLoss(mean(lambda loss: loss.loss), metrics | of_sources)


def sums_of(loss: Loss) -> Tensor:
    """[2 + metrics], float64: its sum, what that is a sum over, and the sums of its metrics."""
    return torch.stack([loss.sum.detach(), loss.count, *loss.metrics.values()]).double()


class Ranks(Protocol):
    """The processes that train together."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def sum_over_ranks(self, value: float) -> float: ...

    def gather(self, value: Any) -> list[Any]:
        """A small object of every rank, in order of rank, on every rank."""
        ...


class TrainingEngine(Ranks, Protocol):
    objective: Objective
    meter: FlopsMeter
    micro_batch_losses: list[float]  # means of the last step's, on this rank
    initial_adapter: dict[str, Tensor] | None  # of PiSSA: what the base was reduced by
    ties_embeddings: bool
    adapter_options: dict[str, Any]  # of PEFT, beside its linear layers

    @property
    def num_shares(self) -> int:
        """A step's examples are divided into that many; the ranks that share every row have one share."""
        ...

    @property
    def share(self) -> int: ...

    def forward_backward(self, rows: Iterable[PackedRow], *, denominator: int) -> StepLoss:
        """Accumulates the gradient of (sum of losses over all shares) / denominator; returns that loss."""
        ...

    def optim_step(self, *, lr: float) -> float:
        """One update; returns the norm of the whole gradient before clipping."""
        ...

    def evaluate(self, rows: Iterable[PackedRow]) -> StepLoss:
        """Means over all ranks, per what the objective counts: trained tokens, or examples."""
        ...

    def next_tokens(self, row: PackedRow) -> list[int]:
        """The likeliest token after each of the row's rows."""
        ...

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every trained parameter, whole and in float32, one at a time."""
        ...

    def shard(self) -> Shard:
        """This rank's share of weights and moments, copied to the CPU. No communication."""
        ...

    def restore(self, saved: ShardedState, *, step: int) -> None:
        """Master weights and moments as the shards of any world size and stage hold them."""
        ...


def all_ranks(ranks: Ranks, condition: bool) -> bool:
    return ranks.sum_over_ranks(float(condition)) == ranks.world_size
