"""A `TrainingEngine` that trains nothing: one rank, losses as the test gives them, every call kept in its order."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ftray.model.families import FullAttention
from ftray.model.flops import ModelFlops
from ftray.model.packed import PackedRow
from ftray.objectives import OBJECTIVES, Objective
from ftray.train.engine.protocol import StepLoss
from ftray.train.engine.state import Shard, ShardedState
from ftray.train.step_record import FlopsMeter


class FakeEngine:
    rank, world_size, share, num_shares = 0, 1, 0, 1
    initial_adapter: dict[str, Tensor] | None = None
    ties_embeddings = False

    def __init__(
        self,
        *,
        objective: Objective = OBJECTIVES["sft"],
        losses: Mapping[int, float] | None = None,
        grad_norms: Mapping[int, float] | None = None,
        calls: list[Any] | None = None,
    ):
        """`losses`, `grad_norms`: by the number of its step, 1 for the first; else 1.0. `calls`: one list for several
        actors."""
        self.objective, self.adapter_options = objective, {}
        self.meter = FlopsMeter(
            ModelFlops(1, 1, (FullAttention(1, 1),)), 1.0, trains_base=False, reference=objective.needs_reference
        )
        self.micro_batch_losses: list[float] = []
        self.calls: list[Any] = calls if calls is not None else []
        self.value = 0.0  # of its one weight: the sum of the rates so far
        self.num_updates = 0
        self._losses = losses or {}
        self._grad_norms = grad_norms or {}

    def forward_backward(self, rows: Iterable[PackedRow], *, denominator: int) -> StepLoss:
        given = list(rows)
        self.calls.append(("forward_backward", denominator, [len(row.ids_T) for row in given]))
        loss = self._losses.get(self.num_updates + 1, 1.0)
        self.micro_batch_losses = [loss] * len(given)
        return StepLoss(loss, {})

    def optim_step(self, *, lr: float) -> float:
        self.calls.append(("optim_step", lr))
        self.value += lr
        self.num_updates += 1
        return self._grad_norms.get(self.num_updates, 1.0)

    def evaluate(self, rows: Iterable[PackedRow]) -> StepLoss:
        self.calls.append(("evaluate", len(list(rows))))
        return StepLoss(0.5, {})

    def next_tokens(self, row: PackedRow) -> list[int]:
        return [0] * len(row.rows_N)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        yield "w", torch.full((2, 2), self.value)

    def shard(self) -> Shard:
        return Shard({"master.w": torch.full((4,), self.value)}, {"w": 0}, {"w": [2, 2]})

    def restore(self, saved: ShardedState, *, step: int) -> None:
        self.calls.append(("restore", step))
        self.num_updates = step

    def sum_over_ranks(self, value: float) -> float:
        return value

    def gather(self, value: Any) -> list[Any]:
        return [value]
