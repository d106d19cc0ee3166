"""Which tokens of a step use which slots.

The kernels of `cpu/kernels.py` take all of a slab's while they multiply. Elsewhere, in as few multiplications as there
can be: neighbouring slots with few tokens each are one batched matmul; a longer span of one adapter, a prompt, is a
run of its own.

Shapes: T tokens, G adapters with n tokens each, R summed ranks of a group's layers.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ftray.infer.torch_engine.cpu.kernels import AdaptersArray, AdaptersStruct, floats, slots_struct
from ftray.infer.torch_engine.lora.slots import Factors, Place, Slab

# Up to so many tokens an adapter's factors cost more to read than to multiply by: padding to them is free.
FEW_TOKENS = 8

Span = tuple[Place, int, int]  # an adapter's place, its first row, its number of rows


class StepRuns:
    """What the layers of a step add for the adapters of its tokens: with CPU kernels all of it while they multiply,
    elsewhere in multiplications apart (`matmuls`)."""

    def __init__(self, spans: Sequence[Span], device: torch.device, *, with_kernels: bool):
        self.spans = spans
        self.matmuls = [] if with_kernels else matmul_runs(spans, device)
        self._slabs = slab_runs(spans) if with_kernels else []
        self._arrays: dict[str, AdaptersArray | None] = {}

    def adapters(self, group: str) -> AdaptersArray | None:
        """For the kernels. None: they leave the group's outputs as they are. Valid while this lives."""
        if group not in self._arrays:
            found = [own for run in self._slabs if (own := run.adapters(group)) is not None]
            self._arrays[group] = (AdaptersStruct * len(found))(*found) if found else None
        return self._arrays[group]


def slab_runs(spans: Sequence[Span]) -> "list[SlabRun]":
    slabs: dict[int, list[Span]] = {}
    for span in spans:
        slabs.setdefault(span[0].slab.number, []).append(span)
    return [SlabRun(own) for own in slabs.values()]


def matmul_runs(spans: Sequence[Span], device: torch.device) -> "list[MatmulRun]":
    groups: list[list[Span]] = []
    for span in sorted(spans, key=lambda s: (s[0].order, s[1])):
        if groups and can_join(groups[-1], span):
            groups[-1].append(span)
        else:
            groups.append([span])
    return [make_run(group, device) for group in groups]


def can_join(group: Sequence[Span], span: Span) -> bool:
    last = group[-1][0]
    if last.slab is not span[0].slab or last.slot + 1 != span[0].slot:
        return False
    return all(count <= FEW_TOKENS for _, _, count in [*group, span])


class SlabRun:
    """All spans of one slab."""

    def __init__(self, spans: Sequence[Span]):
        self._slab = spans[0][0].slab
        num_tokens = sum(count for _, _, count in spans)
        ranks = [factors.a.shape[1] for factors in self._slab.factors.values() if factors.segments]  # no experts'
        self._reduced = floats(num_tokens * max(ranks, default=1))
        self._spans_G3 = torch.tensor([(place.slot, start, count) for place, start, count in spans])
        self._shared = (self._spans_G3.data_ptr(), len(spans), self._reduced.data_ptr())

    def adapters(self, group: str) -> AdaptersStruct | None:
        """None: these adapters leave the group as it is. Valid while the run lives."""
        slots = self._slab.structs.get(group)
        if slots is None:
            if group not in self._slab.factors:
                return None
            slots = self._slab.structs[group] = slots_struct(self._slab.factors[group])
        return AdaptersStruct(ctypes.addressof(slots), *self._shared)


@dataclass
class MatmulRun:
    """Neighbouring slots of one slab and the tokens that use them: [G adapters, n tokens each], padded to the most."""

    slab: Slab
    first: int
    end: int
    rows: Tensor  # [G * n] row of every place; a pad repeats its adapter's first row
    real: Tensor | None  # places that are no pad; None: all are, and the rows are neighbours from `start` on
    start: int
    _views: dict[str, Factors | None] = field(default_factory=dict)

    @property
    def num_adapters(self) -> int:
        return self.end - self.first

    def add_to(self, outs_TO: Sequence[Tensor], x_TI: Tensor, group: str) -> None:
        """Adds B A x of the run's adapters to their tokens' rows of the group's outputs."""
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

    def _factors(self, group: str) -> Factors | None:
        """Of the run's slots, with a leading G; None: these adapters leave the group as it is."""
        if group not in self._views:
            own, slots = self.slab.factors.get(group), slice(self.first, self.end)
            views = None if own is None else Factors(own.a[slots], tuple(b[slots] for b in own.bt), own.segments)
            self._views[group] = views
        return self._views[group]


def make_run(group: Sequence[Span], device: torch.device) -> MatmulRun:
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
    )
