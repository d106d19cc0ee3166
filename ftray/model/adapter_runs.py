"""Which tokens of a step use which slots, in as few multiplications as there can be.

On a GPU neighbouring slots with few tokens each are one batched matmul; on a CPU the kernels of `cpu_kernels.py` take
all of a slab's. A longer stretch of one adapter, a prompt, is a run of its own.

Shapes: T tokens, G adapters with n tokens each, R summed ranks of a group's layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import silu

from ftray.model.adapter_slots import Factors, Place, Slab
from ftray.model.cpu_kernels import CpuKernels, SlotsStruct, slots_struct

# Up to so many tokens an adapter's factors cost more to read than to multiply by: padding to them is free.
FEW_TOKENS = 8
# Up to so many tokens of an adapter the CPU kernels are faster than a matmul of its own (11 against 36 ms for 8 tokens
# of 8 adapters, 50 against 61 for 128 of 4; rank 16, 135M model).
KERNEL_TOKENS = 128

Stretch = tuple[Place, int, int]  # an adapter's place, its first row, its number of rows


class Run(Protocol):
    def add_to(self, outs_TO: Sequence[Tensor], x_TI: Tensor, group: str) -> None:
        """Adds B A x of the run's adapters to their tokens' rows of the group's outputs."""
        ...

    def add_and_gate(self, gate_TO: Tensor, up_TO: Tensor, x_TI: Tensor, group: str) -> None:
        """As `add_to`, and then gate = silu(gate) * up, in all rows."""
        ...


def runs_of(stretches: Sequence[Stretch], device: torch.device, kernels: CpuKernels | None) -> list[Run]:
    if kernels is not None:
        slabs: dict[int, list[Stretch]] = {}
        for stretch in stretches:
            if stretch[2] <= KERNEL_TOKENS:
                slabs.setdefault(stretch[0].slab.number, []).append(stretch)
        few = [KernelRun(own, kernels) for own in slabs.values()]
        long = [make_run([stretch], device, kernels) for stretch in stretches if stretch[2] > KERNEL_TOKENS]
        return [*long, *few]
    groups: list[list[Stretch]] = []
    for stretch in sorted(stretches, key=lambda s: (s[0].order, s[1])):
        if groups and can_join(groups[-1], stretch):
            groups[-1].append(stretch)
        else:
            groups.append([stretch])
    return [make_run(group, device, kernels) for group in groups]


def can_join(group: Sequence[Stretch], stretch: Stretch) -> bool:
    last = group[-1][0]
    if last.slab is not stretch[0].slab or last.slot + 1 != stretch[0].slot:
        return False
    return all(count <= FEW_TOKENS for _, _, count in [*group, stretch])


class KernelRun:
    """All stretches of few tokens of one slab."""

    def __init__(self, stretches: Sequence[Stretch], kernels: CpuKernels):
        self._slab = stretches[0][0].slab
        self._kernels = kernels
        self._stretches_G3 = torch.tensor([(place.slot, start, count) for place, start, count in stretches])

    def add_to(self, outs_TO: Sequence[Tensor], x_TI: Tensor, group: str) -> None:
        slots = self._slots(group)
        if slots is not None:
            self._kernels.add_adapters_(slots, self._stretches_G3, x_TI, outs_TO)

    def add_and_gate(self, gate_TO: Tensor, up_TO: Tensor, x_TI: Tensor, group: str) -> None:
        slots = self._slots(group)
        if slots is None:
            self._kernels.silu_times_(gate_TO, up_TO)
        else:
            self._kernels.add_adapters_(slots, self._stretches_G3, x_TI, (gate_TO, up_TO), gated=True)

    def _slots(self, group: str) -> SlotsStruct | None:
        """None: these adapters leave the group as it is."""
        slots = self._slab.structs.get(group)
        if slots is None and group in self._slab.factors:
            slots = self._slab.structs[group] = slots_struct(self._slab.factors[group])
        return slots


@dataclass
class MatmulRun:
    """Neighbouring slots of one slab and the tokens that use them: [G adapters, n tokens each], padded to the most."""

    slab: Slab
    first: int
    end: int
    rows: Tensor  # [G * n] row of every place; a pad repeats its adapter's first row
    real: Tensor | None  # places that are no pad; None: all are, and the rows are neighbours from `start` on
    start: int
    kernels: CpuKernels | None
    _views: dict[str, Factors | None] = field(default_factory=dict)

    @property
    def num_adapters(self) -> int:
        return self.end - self.first

    def add_to(self, outs_TO: Sequence[Tensor], x_TI: Tensor, group: str) -> None:
        factors = self._factors(group)
        if factors is None:
            return
        factors = factors.to(x_TI.dtype)
        ranks = [bt.shape[1] for bt in factors.bt]
        rows = slice(self.start, self.start + len(self.rows))
        if self.real is None and self.num_adapters == 1:
            reduced_TR = torch.mm(x_TI[rows], factors.a[0].t())
            for out_TO, part, bt in zip(outs_TO, reduced_TR.split(ranks, dim=1), factors.bt, strict=True):
                out_TO[rows].addmm_(part, bt[0])
            return
        x_RI = x_TI[rows] if self.real is None else x_TI.index_select(0, self.rows)
        x_GnI = x_RI.view(self.num_adapters, -1, x_TI.shape[1])
        reduced_GnR = torch.bmm(factors.a, x_GnI.transpose(1, 2)).transpose(1, 2)
        for out_TO, part, bt in zip(outs_TO, reduced_GnR.split(ranks, dim=2), factors.bt, strict=True):
            if self.real is None:
                out_TO[rows].view(self.num_adapters, -1, out_TO.shape[1]).baddbmm_(part, bt)
            else:
                update = torch.bmm(part, bt).view(len(self.rows), -1)
                out_TO.index_add_(0, self.rows.index_select(0, self.real), update.index_select(0, self.real))

    def add_and_gate(self, gate_TO: Tensor, up_TO: Tensor, x_TI: Tensor, group: str) -> None:
        self.add_to((gate_TO, up_TO), x_TI, group)
        if self.kernels is None:
            silu(gate_TO, inplace=True).mul_(up_TO)
        else:
            self.kernels.silu_times_(gate_TO, up_TO)

    def _factors(self, group: str) -> Factors | None:
        """Of the run's slots, with a leading G; None: these adapters leave the group as it is."""
        if group not in self._views:
            own, slots = self.slab.factors.get(group), slice(self.first, self.end)
            views = None if own is None else Factors(own.a[slots], tuple(b[slots] for b in own.bt), own.segments)
            self._views[group] = views
        return self._views[group]


def make_run(group: Sequence[Stretch], device: torch.device, kernels: CpuKernels | None) -> MatmulRun:
    most = max(count for _, _, count in group)
    rows: list[int] = []
    real: list[int] = []
    for index, (_, start, count) in enumerate(group):
        rows += [*range(start, start + count), *[start] * (most - count)]
        real += range(index * most, index * most + count)
    whole = rows == list(range(rows[0], rows[0] + len(rows)))
    return MatmulRun(
        slab=group[0][0].slab,
        first=group[0][0].slot,
        end=group[-1][0].slot + 1,
        rows=torch.tensor(rows, device=device),
        real=None if whole else torch.tensor(real, device=device),
        start=rows[0],
        kernels=kernels,
    )
