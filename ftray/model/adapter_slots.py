"""Adapters on the device: slots of equal shape side by side in slabs, so that one batched matmul serves neighbours.

The host keeps every loaded adapter (`HostAdapter`); a slot is a copy of one. Slots are bounded by bytes, not by
number: a slab holds adapters of one shape (which layers, which ranks), and a slab without a used slot is given up when
another shape needs the room. Least recently used first, never one that a running sequence
holds.

Shapes: S slots, G neighbouring ones, R summed ranks of a group's layers. `bt`: B transposed, the scale folded in.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ftray.errors import AdapterError

MAX_SLOTS_PER_SLAB = 8
# A slab takes at most this share of the budget, so that adapters of several shapes can be in use at once.
SLAB_SHARE = 4
# Up to so many tokens an adapter's factors cost more to read than to multiply by: padding to them is free.
FEW_TOKENS = 8

Shape = tuple[tuple[str, tuple[int, ...]], ...]  # (group, ranks of its multiplications) of every adapted group


@dataclass(frozen=True)
class Factors:
    """Of one group of layers, for one adapter; with a leading S: for all slots of a slab.

    Layers that are one multiplication have one `bt`, zero where a layer's rows meet another's columns: a third more to
    read, and one operation instead of one for each layer.
    """

    a: Tensor  # [R, in]
    bt: tuple[Tensor, ...]  # of each multiplication: [ranks, outs]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.a, *self.bt)


@dataclass(frozen=True)
class HostAdapter:
    key: str
    factors: dict[str, Factors]  # by group

    @property
    def shape(self) -> Shape:
        return tuple((group, tuple(b.shape[0] for b in f.bt)) for group, f in sorted(self.factors.items()))

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for f in self.factors.values() for t in f.tensors)


@dataclass
class Slab:
    number: int
    factors: dict[str, Factors]
    num_bytes: int
    keys: list[str | None] = field(default_factory=list)


@dataclass(frozen=True)
class Place:
    slab: Slab
    slot: int

    @property
    def order(self) -> tuple[int, int]:
        return self.slab.number, self.slot


class AdapterSlots:
    def __init__(self, *, budget_bytes: int, device: torch.device):
        self.budget_bytes = budget_bytes
        self._device = device
        self._slabs: dict[Shape, list[Slab]] = {}
        self._places: OrderedDict[str, Place] = OrderedDict()  # least recently used first
        self._pins: dict[str, int] = {}
        self._num_slabs_made = 0

    @property
    def used_bytes(self) -> int:
        return sum(slab.num_bytes for slabs in self._slabs.values() for slab in slabs)

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(self._places)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def place(self, key: str) -> Place:
        return self._places[key]

    def check(self, adapter: HostAdapter) -> None:
        """Raises `AdapterError` for one that could never have a slot."""
        if adapter.num_bytes > self.budget_bytes:
            raise AdapterError(
                f"{adapter.key}: takes {adapter.num_bytes:,} bytes, over this endpoint's adapters.device_budget "
                f"({self.budget_bytes:,}); raise it or publish a smaller rank"
            )

    def acquire(self, adapter: HostAdapter) -> bool:
        """Pins the adapter in a slot, copying it there if need be. False: every slot that could be freed is in use."""
        key = adapter.key
        if key not in self._places:
            place = self._free_place(adapter)
            if place is None:
                return False
            for group, own in adapter.factors.items():
                for slots, tensor in zip(place.slab.factors[group].tensors, own.tensors, strict=True):
                    slots[place.slot].copy_(tensor, non_blocking=True)
            place.slab.keys[place.slot] = key
            self._places[key] = place
        self._places.move_to_end(key)
        self._pins[key] = self._pins.get(key, 0) + 1
        return True

    def release(self, key: str) -> None:
        self._pins[key] -= 1
        if self._pins[key] == 0:
            del self._pins[key]

    def drop(self, key: str) -> None:
        """Forgets an adapter that is unloaded."""
        place = self._places.pop(key, None)
        if place is not None:
            place.slab.keys[place.slot] = None

    def _free_place(self, adapter: HostAdapter) -> Place | None:
        shape = adapter.shape
        slabs = self._slabs.setdefault(shape, [])
        for slab in slabs:
            if None in slab.keys:
                return Place(slab, slab.keys.index(None))
        size = adapter.num_bytes
        wanted = max(1, min(MAX_SLOTS_PER_SLAB, self.budget_bytes // SLAB_SHARE // size))
        self._give_up_empty_slabs()
        while (room := self.budget_bytes - self.used_bytes) < size:
            unused = [key for key in self._places if key not in self._pins]
            if room + self._unused_bytes() < size:  # whole slabs do not suffice: a slot of its own shape, or none
                unused = [key for key in unused if any(slab is self._places[key].slab for slab in slabs)]
            if not unused:
                return None
            freed = self._places[unused[0]]
            self.drop(unused[0])
            if any(slab is freed.slab for slab in slabs):
                return freed
            self._give_up_empty_slabs()
        slab = self._make_slab(adapter, min(wanted, room // size))
        slabs.append(slab)
        return Place(slab, 0)

    def _unused_bytes(self) -> int:
        """Of slabs that no running sequence needs."""
        all_slabs = [slab for slabs in self._slabs.values() for slab in slabs]
        return sum(slab.num_bytes for slab in all_slabs if not any(key in self._pins for key in slab.keys))

    def _give_up_empty_slabs(self) -> None:
        for slabs in self._slabs.values():
            slabs[:] = [slab for slab in slabs if any(key is not None for key in slab.keys)]

    def _make_slab(self, adapter: HostAdapter, num_slots: int) -> Slab:
        def slots(tensor: Tensor) -> Tensor:
            return torch.empty((num_slots, *tensor.shape), dtype=tensor.dtype, device=self._device)

        factors = {g: Factors(slots(f.a), tuple(slots(b) for b in f.bt)) for g, f in adapter.factors.items()}
        self._num_slabs_made += 1
        return Slab(self._num_slabs_made, factors, num_slots * adapter.num_bytes, [None] * num_slots)


@dataclass
class Run:
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

    def factors(self, group: str) -> Factors | None:
        """Of the run's slots, with a leading G; None: these adapters leave the group as it is."""
        if group not in self._views:
            own, slots = self.slab.factors.get(group), slice(self.first, self.end)
            self._views[group] = None if own is None else Factors(own.a[slots], tuple(b[slots] for b in own.bt))
        return self._views[group]


Stretch = tuple[Place, int, int]  # an adapter's place, its first row, its number of rows


def runs_of(stretches: Sequence[Stretch], device: torch.device) -> list[Run]:
    """Neighbours with few tokens each together, every longer stretch alone."""
    groups: list[list[Stretch]] = []
    for stretch in sorted(stretches, key=lambda s: (s[0].order, s[1])):
        if groups and can_join(groups[-1], stretch):
            groups[-1].append(stretch)
        else:
            groups.append([stretch])
    return [make_run(group, device) for group in groups]


def can_join(group: Sequence[Stretch], stretch: Stretch) -> bool:
    last = group[-1][0]
    if last.slab is not stretch[0].slab or last.slot + 1 != stretch[0].slot:
        return False
    return all(count <= FEW_TOKENS for _, _, count in [*group, stretch])


def make_run(group: Sequence[Stretch], device: torch.device) -> Run:
    most = max(count for _, _, count in group)
    rows: list[int] = []
    real: list[int] = []
    for index, (_, start, count) in enumerate(group):
        rows += [*range(start, start + count), *[start] * (most - count)]
        real += range(index * most, index * most + count)
    whole = rows == list(range(rows[0], rows[0] + len(rows)))
    return Run(
        slab=group[0][0].slab,
        first=group[0][0].slot,
        end=group[-1][0].slot + 1,
        rows=torch.tensor(rows, device=device),
        real=None if whole else torch.tensor(real, device=device),
        start=rows[0],
    )
