"""Adapters on the device: slots of equal shape side by side in slabs, so that one batched matmul serves neighbours.

The host keeps every loaded adapter (`HostAdapter`); a slot is a copy of one. Slots are bounded by bytes, not by
number: a slab holds adapters of one shape (which layers, which ranks), and a slab without a used slot is given up when
another shape needs the room. Least recently used first, never one that a running sequence
holds.

Shapes: S slots, G neighbouring ones, R summed ranks of a group's layers. `bt`: B transposed, the scale folded in.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ftray.errors import AdapterError
from ftray.infer.torch_engine.cpu.huge_pages import aligned, empty_bytes

MAX_SLOTS_PER_SLAB = 8
# A slab takes at most this share of what is left of the budget: adapters of several shapes can be in use at once.
SLAB_SHARE = 4


class Segment(NamedTuple):
    """Where one layer's B lies in the `bt` of its multiplication."""

    output: int
    row: int
    num_rows: int
    column: int
    num_columns: int


Shape = tuple[tuple[str, torch.dtype, tuple[Segment, ...], torch.Size], ...]  # of every adapted group


@dataclass(frozen=True)
class Factors:
    """Of one group of layers, for one adapter; with a leading S: for all slots of a slab.

    Layers that are one multiplication have one `bt`, zero where a layer's rows meet another's columns.
    """

    a: Tensor  # [R, in]
    bt: tuple[Tensor, ...]  # of each multiplication: [ranks, outs]; for the CPU kernels in blocks of columns
    segments: tuple[Segment, ...]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.a, *self.bt)

    def to(self, dtype: torch.dtype) -> "Factors":
        return Factors(self.a.to(dtype), tuple(bt.to(dtype) for bt in self.bt), self.segments)


@dataclass(frozen=True)
class HostAdapter:
    key: str
    factors: dict[str, Factors]  # by group

    @property
    def shape(self) -> Shape:
        return tuple((group, f.a.dtype, f.segments, f.a.shape) for group, f in sorted(self.factors.items()))

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for f in self.factors.values() for t in f.tensors)


@dataclass
class Slab:
    number: int
    factors: dict[str, Factors]
    num_bytes: int
    keys: list[str | None] = field(default_factory=list)
    structs: dict[str, Any] = field(default_factory=dict)  # of the CPU kernels, by group


@dataclass(frozen=True)
class Place:
    slab: Slab
    slot: int

    @property
    def order(self) -> tuple[int, int]:
        return self.slab.number, self.slot


class AdapterSlots:
    def __init__(self, *, budget_bytes: int, device: torch.device, giving_up: Callable[[], None] = lambda: None):
        """`giving_up` is called before the memory of slabs is needed for others: who holds them must let go."""
        self.budget_bytes = budget_bytes
        self._giving_up = giving_up
        self._device = device
        self._slabs: dict[Shape, list[Slab]] = {}
        self._places: OrderedDict[str, Place] = OrderedDict()  # least recently used first
        self._pins: dict[str, int] = {}
        self._num_slabs_made = 0

    @property
    def used_bytes(self) -> int:
        return sum(slab.num_bytes for slabs in list(self._slabs.values()) for slab in list(slabs))

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
        slab = self._make_slab(adapter, max(1, min(MAX_SLOTS_PER_SLAB, room // SLAB_SHARE // size)))
        slabs.append(slab)
        return Place(slab, 0)

    def _unused_bytes(self) -> int:
        """Of slabs that no running sequence needs."""
        all_slabs = [slab for slabs in self._slabs.values() for slab in slabs]
        return sum(slab.num_bytes for slab in all_slabs if not any(key in self._pins for key in slab.keys))

    def _give_up_empty_slabs(self) -> None:
        for slabs in self._slabs.values():
            kept = [slab for slab in slabs if any(key is not None for key in slab.keys)]
            if len(kept) < len(slabs):
                slabs[:] = kept
                self._giving_up()

    def _make_slab(self, adapter: HostAdapter, num_slots: int) -> Slab:
        sizes = [aligned(num_slots * t.nbytes) for f in adapter.factors.values() for t in f.tensors]
        pieces = iter(empty_bytes(sum(sizes), self._device).split(sizes))

        def slots(tensor: Tensor) -> Tensor:
            piece = next(pieces)[: num_slots * tensor.nbytes]
            return piece.view(tensor.dtype).view(num_slots, *tensor.shape)

        factors = {
            g: Factors(slots(f.a), tuple(slots(b) for b in f.bt), f.segments) for g, f in adapter.factors.items()
        }
        self._num_slabs_made += 1
        return Slab(self._num_slabs_made, factors, num_slots * adapter.num_bytes, [None] * num_slots)
