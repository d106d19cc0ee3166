"""The algorithm of a fused group: a step of every member at once, over one frozen base. No ray.

Each member has its own examples, normaliser, clipping, rate and step count; only the base's passes are shared, and,
over several workers, one all-reduce of all gradients.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ftray.data.dataset import TokenizedDataset
from ftray.data.examples import Example
from ftray.data.micro_batches import divide
from ftray.data.pack import pack
from ftray.model.adapters.fused_lora import FusedLora, Span
from ftray.model.hardware import Hardware
from ftray.model.packed import PackedCausalLM
from ftray.objectives import LogProbs, Loss, LossFunction, Objective
from ftray.sweep.fused.member import Member
from ftray.train.engine.protocol import StepLoss, combined, sums_of
from ftray.train.loop import by_source, denominator_of

Work = tuple[Member, Sequence[Example]]
STEPS_TO_COMPARE = 3  # of each way


@dataclass(frozen=True)
class MemberStep:
    """What a member's step came to, over all workers."""

    loss: float  # before the update
    metrics: dict[str, float]
    grad_norm: float  # before clipping
    learning_rate: float
    seconds: float  # its share of the group's step, by tokens


class RowSharing:
    """Whether micro-batches of several members share a row. Results are the same either way, so the first steps take
    turns and the faster way stays; a sweep that goes on keeps to it."""

    def __init__(self, is_faster: bool | None = None):
        self.is_faster = is_faster  # None: not known yet
        self.rates: dict[bool, list[float]] = {True: [], False: []}  # tokens/s
        self._num_steps = 0

    @property
    def now(self) -> bool:
        return self._num_steps % 2 == 0 if self.is_faster is None else self.is_faster

    def note(self, tokens_per_s: float, *, num_members: int) -> None:
        """Of a step; nothing is learned from one of a single member, nor from the first two, which warm up."""
        if self.is_faster is not None or num_members < 2:
            return
        if self._num_steps >= 2:
            self.rates[self.now].append(tokens_per_s)
        self._num_steps += 1
        if all(len(rates) == STEPS_TO_COMPARE for rates in self.rates.values()):
            self.is_faster = max(self.rates[True]) >= max(self.rates[False])


class FusedGroup:
    def __init__(
        self,
        model: PackedCausalLM,
        fused: FusedLora,
        objective: Objective,
        loss: LossFunction,
        hardware: Hardware,
        *,
        token_budget: int,  # of one forward: several members' micro-batches go together up to it
        sharing: RowSharing | None = None,  # None: they always do
    ):
        self._model = model
        self._fused = fused
        model.run_states_within(fused.rows)
        self._objective = objective
        self._loss = loss
        self._hardware = hardware
        self._token_budget = token_budget
        self.sharing = sharing or RowSharing(is_faster=True)
        self._rank, self._world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    def step(self, members: Sequence[Member]) -> dict[str, MemberStep | str]:
        """One update of each member, all of them at steps of their own. By name; a text where its loss was no good and
        no update was made."""
        began = time.perf_counter()
        self._model.train()
        examples = {member.name: member.source.step(member.step) for member in members}
        counts = {name: denominator_of(self._objective, of) for name, of in examples.items()}
        sums, names = self._forward_backward(members, examples, counts)
        self._reduce_gradients(members)
        totals = self._reduce_sums(sums)
        seconds = time.perf_counter() - began
        tokens = {name: num_tokens(of) for name, of in examples.items()}
        self.sharing.note(sum(tokens.values()) / seconds, num_members=len(members))
        outcome: dict[str, MemberStep | str] = {}
        for member in members:
            losses = (totals[member.name] / counts[member.name]).tolist()
            share = seconds * tokens[member.name] / sum(tokens.values())
            outcome[member.name] = update(member, losses, names.get(member.name, []), seconds=share)
        for member in members:
            member.optimizer.zero_grad(set_to_none=True)
        return outcome

    def _forward_backward(
        self, members: Sequence[Member], examples: dict[str, Sequence[Example]], counts: dict[str, int]
    ) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
        """Accumulates gradients of this rank's share; by member the sums of its loss and its metrics, and their
        names."""
        work = [
            (member, micro_batch)
            for member in members
            for micro_batch in self._shares(examples[member.name], member.config.batch.tokens_per_micro_batch)
            if micro_batch
        ]
        sums = {member.name: torch.zeros(0, dtype=torch.float64) for member in members}
        names: dict[str, list[str]] = {}
        for together in self._rows(work):
            losses, spans = self._losses(together)
            shares = [loss.sum / counts[member.name] for (member, _), loss in zip(together, losses, strict=True)]
            with self._fused.apply(spans):  # activation checkpointing computes layers again
                torch.stack(shares).sum().backward()
            for (member, _), loss in zip(together, losses, strict=True):
                reported = torch.stack([loss.sum.detach(), *loss.metrics.values()]).double().cpu()
                sums[member.name] = reported if not len(sums[member.name]) else sums[member.name] + reported
                names[member.name] = list(loss.metrics)
        return sums, names

    def _shares(self, examples: Sequence[Example], token_budget: int) -> list[list[Example]]:
        """This rank's micro-batches."""
        return divide(examples, world_size=self._world_size, token_budget=token_budget)[self._rank]

    def evaluate(
        self, members: Sequence[Member], dataset: TokenizedDataset, *, on_row: Callable[[], None] = lambda: None
    ) -> dict[str, StepLoss]:
        """Of each. `on_row`: called as it goes."""
        parts = by_source(dataset)
        found = {name: self._evaluate(members, examples, on_row) for name, examples in parts.items()}
        if len(found) == 1:
            return next(iter(found.values()))
        counts = {name: denominator_of(self._objective, examples) for name, examples in parts.items()}
        return {
            member.name: combined({name: of_source[member.name] for name, of_source in found.items()}, counts)
            for member in members
        }

    @torch.no_grad()
    def _evaluate(
        self, members: Sequence[Member], examples: Sequence[Example], on_row: Callable[[], None]
    ) -> dict[str, StepLoss]:
        self._model.eval()
        budget = max(member.config.batch.tokens_per_micro_batch for member in members)
        shares = self._shares(examples, budget)
        work = [(member, micro_batch) for micro_batch in shares if micro_batch for member in members]
        sums = {member.name: torch.zeros(0, dtype=torch.float64) for member in members}
        names: list[str] = []
        for together in self._rows(work):
            for (member, _), loss in zip(together, self._losses(together)[0], strict=True):
                found = sums_of(loss).cpu()
                sums[member.name] = found if not len(sums[member.name]) else sums[member.name] + found
                names = list(loss.metrics)
            on_row()
        evaluated = {}
        for name, (total, count, *metrics) in self._reduce_sums(sums).items():
            means = [(metric / count).item() for metric in metrics]
            evaluated[name] = StepLoss((total / count).item(), dict(zip(names, means, strict=False)))
        return evaluated

    def _rows(self, work: Sequence[Work]) -> Iterable[list[Work]]:
        """Neighbouring micro-batches together, up to the budget."""
        row: list[Work] = []
        used = 0
        for member, micro_batch in work:
            size = num_tokens(micro_batch)
            if row and (not self.sharing.now or used + size > self._token_budget):
                yield row
                row, used = [], 0
            row.append((member, micro_batch))
            used += size
        if row:
            yield row

    def _losses(self, together: Sequence[Work]) -> tuple[list[Loss], list[Span]]:
        """One forward for all; each member's loss from its own part, and whose the row's tokens are."""
        parts = [pack(micro_batch).to(self._hardware.device) for _, micro_batch in together]
        row = pack([example for _, micro_batch in together for example in micro_batch]).to(self._hardware.device)
        spans = [(member.name, len(part.ids_T)) for (member, _), part in zip(together, parts, strict=True)]
        sizes = [len(part.rows_N) for part in parts]
        with self._fused.apply(spans):
            policy = self._model(row).split(sizes)
        reference: Sequence[Tensor | None] = [None] * len(parts)
        if self._objective.needs_reference:
            with torch.no_grad():
                reference = self._model(row).split(sizes)  # no spans: the base alone
        given = zip(policy, reference, parts, strict=True)
        return [self._loss(LogProbs(own, base), part) for own, base, part in given], spans

    def _reduce_gradients(self, members: Sequence[Member]) -> None:
        """One all-reduce: adapters are small, and many small ones would wait for each other's latency."""
        parameters = [parameter for member in members for parameter in member.parameters.values()]
        for parameter in parameters:
            if parameter.grad is None:  # this rank had no example of it
                parameter.grad = torch.zeros_like(parameter)
        if self._world_size == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def _reduce_sums(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        if self._world_size == 1:
            return sums
        width = max(len(value) for value in sums.values())
        lengths: list[int] = [0] * self._world_size
        dist.all_gather_object(lengths, width)
        width = max(lengths)
        flat = torch.stack([torch.nn.functional.pad(value, (0, width - len(value))) for value in sums.values()])
        flat = flat.to(self._hardware.device)
        dist.all_reduce(flat)
        return dict(zip(sums, flat.cpu(), strict=True))


def num_tokens(examples: Sequence[Example]) -> int:
    return sum(example.length for example in examples)


def update(member: Member, losses: list[float], names: list[str], *, seconds: float) -> MemberStep | str:
    """Of a member whose gradients lie there. `losses`: means over the step, the loss and the metrics of these names."""
    loss, *metrics = losses
    if (problem := member.guard.problem(loss)) is not None:
        return f"step {member.step + 1}: {problem}"
    rate = member.learning_rate(member.step)
    norm = member.update()
    if not math.isfinite(norm):
        return f"step {member.step + 1}: the gradient norm is {norm}"
    return MemberStep(loss, dict(zip(names, metrics, strict=False)), norm, rate, seconds)
