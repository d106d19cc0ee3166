"""Who has waited for a place or a slot for too long, and who gives one up: long answers keep nobody out.

The newest sequence of an owner (or of a flow) that has several places gives its own up when another has long been next
and has none; so do all sequences of an adapter whose turn at a slot is over (`slot_rotation.py`).
"""

from collections.abc import Callable, Iterator
from typing import Protocol

from ftray.infer.fair_queue import FairQueue, FlowKey
from ftray.infer.torch_engine.kv_cache import PagePool, pages_for
from ftray.infer.torch_engine.sequence import Sequence
from ftray.infer.torch_engine.slot_rotation import SlotRotation, owners_of_adapters

# An adapter that lacks a slot is starved after so many steps: no other gets a slot before it, and turns end for it.
MAX_STEPS_WITHOUT_SLOT = 64
# While every place is taken, who is next and has none waits so many steps; then who has several gives one up.
MAX_STEPS_CROWDED_OUT = 64


class DeviceAdapters(Protocol):
    """`infer/torch_engine/lora/bank.py`'s bank: adapters have to be acquired to take part in a forward pass."""

    def acquire(self, key: str) -> bool: ...

    def release(self, key: str) -> None: ...

    def is_on_device(self, key: str) -> bool: ...


def can_bring(adapters: DeviceAdapters, key: str | None) -> bool:
    """To the device, if it is not there and a slot can be had."""
    if key is None or adapters.is_on_device(key):
        return True
    if not adapters.acquire(key):
        return False
    adapters.release(key)
    return True


class StarvationPolicy:
    """Looks at the scheduler's own `running`, `waiting` and `pool`; who gives way is handed to `preempt`."""

    def __init__(
        self,
        running: list[Sequence],
        waiting: FairQueue[Sequence],
        pool: PagePool,
        adapters: DeviceAdapters,
        *,
        max_sequences: int,
        max_prefill_tokens: int,
        preempt: Callable[[Sequence], None],
    ):
        self._running = running
        self._waiting = waiting
        self._pool = pool
        self._adapters = adapters
        self._max_sequences = max_sequences
        self._max_prefill_tokens = max_prefill_tokens
        self._preempt = preempt
        self._step = 0
        self._rotation = SlotRotation()
        self._starved: tuple[FlowKey, Sequence] | None = None  # in this step: the first that lacks a slot for too long

    def begin_step(self) -> bool:
        """Frees what is due. False: the one that is starved has lacked pages as well for so long that nobody else may
        come in."""
        self._step += 1
        self._free_place()
        self._starved = self._find_starved()
        return self._starved is None or self._free_slots(*self._starved)

    def in_turn(self) -> Iterator[tuple[FlowKey, Sequence]]:
        if self._starved is not None:
            yield self._starved
        yield from self._waiting.in_order()

    def may_take_slot(self, sequence: Sequence) -> bool:
        """It can have one, and nobody is starved for one, or it is."""
        is_its_turn = self._starved is None or sequence is self._starved[1]
        return is_its_turn and can_bring(self._adapters, sequence.request.adapter)

    def admitted(self, sequence: Sequence) -> None:
        sequence.slotless_since = sequence.crowded_out_since = None
        if self._starved is not None and sequence is self._starved[1]:
            self._starved = None

    def drew(self, adapter: str) -> None:
        """A token, for one of its sequences."""
        self._rotation.drew(adapter, self._step)

    def left(self, adapter: str) -> None:
        """None of its sequences runs any more."""
        self._rotation.left(adapter)

    def _free_place(self) -> None:
        """For the one that is next, if a place is all that it lacks."""
        first = next(self._waiting.in_order(), None)
        if first is None:
            return
        flow, sequence = first
        newest = self._newest_of_crowd(flow) if len(self._running) == self._max_sequences else None
        if newest is None or not self._would_fit(sequence, beside=newest):
            sequence.crowded_out_since = None
        elif sequence.crowded_out_since is None:
            sequence.crowded_out_since = self._step
        elif self._step - sequence.crowded_out_since >= MAX_STEPS_CROWDED_OUT:
            self._preempt(newest)

    def _find_starved(self) -> tuple[FlowKey, Sequence] | None:
        """All who need a slot lack one if the first of them does; if not, a larger one still may."""
        held = owners_of_adapters(self._running)
        needing: list[tuple[FlowKey, Sequence]] = []
        for key, sequence in self._waiting.in_order():
            if sequence.request.adapter in (None, *held):
                sequence.slotless_since = None
            else:
                needing.append((key, sequence))
        lacks = bool(needing) and not can_bring(self._adapters, needing[0][1].request.adapter)
        for key, sequence in needing:
            if sequence.slotless_since is None:
                sequence.slotless_since = self._step if lacks else None
            elif self._step - sequence.slotless_since >= MAX_STEPS_WITHOUT_SLOT:
                if not can_bring(self._adapters, sequence.request.adapter):
                    return key, sequence
                sequence.slotless_since = None
        return None

    def _free_slots(self, key: FlowKey, starved: Sequence) -> bool:
        """For the one that is starved, if pages and a share of the step's prompt tokens can be had with them. False: it
        has lacked pages as well for so long that nobody else may come in."""
        givers = self._rotation.givers(self._running, owner=key[0], step=self._step)
        leaving = [other for other in self._running if other.request.adapter in givers]
        kept = {page for s in self._running if s not in leaving for page in s.pages}
        freed = {page for s in leaving for page in s.pages} - kept
        num_pages = pages_for(len(starved.tokens) + 1)
        num_prompt = sum(s.num_pending for s in self._running if s.num_pending > 1 and s not in leaving)
        if self._pool.num_available + len(freed) < num_pages:
            assert starved.slotless_since is not None
            return self._step - starved.slotless_since < 2 * MAX_STEPS_WITHOUT_SLOT
        for giver in givers if num_prompt < self._max_prefill_tokens else []:
            if can_bring(self._adapters, starved.request.adapter) and self._pool.num_available >= num_pages:
                break
            for other in reversed(leaving):  # so that the oldest is the first of its flow
                if other.request.adapter == giver:
                    self._preempt(other)
        return True

    def _newest_of_crowd(self, flow: FlowKey) -> Sequence | None:
        giver = self._waiting.crowded_beside(flow)
        return next((other for other in reversed(self._running) if other.request.flow == giver), None)

    def _would_fit(self, sequence: Sequence, *, beside: Sequence) -> bool:
        """In the place of the other: its pages and its adapter can be had."""
        if self._pool.num_available + len(beside.pages) < pages_for(len(sequence.tokens) + 1):
            return False
        return can_bring(self._adapters, sequence.request.adapter)
