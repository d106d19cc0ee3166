"""Which sequences take part in the next step, with how many tokens.

Everything that runs goes first: a decoding sequence with its newest token, a prompt with its next piece (chunked
prefill, Agrawal et al. 2024, arXiv 2403.02310), so that a long prompt never stops the others. Then waiting ones come
in, as `fair_queue.py` orders them. When the cache is full the newest sequence, of who has most of it, gives its pages
back and waits at the front of its flow; its tokens are computed again later, or found in the cache. So does the newest
of an owner (or of a flow) that has several places when another has long been next and has none, and so do all sequences
of an adapter whose turn at a slot is over (`slot_rotation.py`): long answers keep nobody out of a place or a slot.
"""

import time
from collections import Counter
from collections.abc import Iterator
from typing import Protocol

from ftray.infer.fair_queue import FairQueue, FlowKey
from ftray.infer.torch_engine.kv_cache import PAGE_TOKENS, PagePool, page_name, pages_for
from ftray.infer.torch_engine.sequence import Piece, Sequence
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


class Scheduler:
    def __init__(
        self,
        num_pages: int,
        *,
        max_sequences: int,
        max_prefill_tokens: int,
        adapters: DeviceAdapters,
    ):
        self.pool = PagePool(num_pages)
        self.running: list[Sequence] = []  # in the order they came in
        self.waiting: FairQueue[Sequence] = FairQueue()
        self.num_preemptions = 0
        self._num_steps = 0
        self._slot_rotation = SlotRotation()
        self._starved: tuple[FlowKey, Sequence] | None = None  # in this step: the first that lacks a slot for too long
        self._max_sequences = max_sequences
        self._max_prefill_tokens = max_prefill_tokens
        self._adapters = adapters

    def add(self, sequence: Sequence, *, front: bool = False) -> None:
        self.waiting.push(sequence.request.flow, sequence, front=front, weight=sequence.request.priority)

    def plan(self) -> list[Piece]:
        pieces: list[Piece] = []
        self._num_steps += 1
        room = self._max_prefill_tokens
        self._make_way()
        self._starved = self._find_starved()
        lacks_pages = self._starved is not None and not self._give_up_slots(*self._starved)
        preemptions = self.num_preemptions
        for sequence in list(self.running):
            is_prompt = sequence.num_pending > 1
            count = min(sequence.num_pending, room) if is_prompt else 1
            if count and sequence in self.running and self._make_room(sequence, count):
                pieces.append(Piece(sequence, count))
                room -= count if is_prompt else 0
        pieces = [piece for piece in pieces if piece.sequence in self.running]  # some may have given their pages up
        if self.num_preemptions == preemptions and not lacks_pages:
            self._admit(pieces, room)
            self._look_ahead()
        return pieces

    def computed(self, piece: Piece) -> None:
        """The piece's keys and values are in the cache now: its full pages get their names."""
        sequence = piece.sequence
        paid = max(sequence.num_cached, sequence.num_charged)  # of one that was pushed back nothing is paid twice
        sequence.num_cached += piece.num_tokens
        sequence.num_charged = max(paid, sequence.num_cached)
        self.waiting.charge(sequence.request.flow, sequence.num_charged - paid)
        while (len(sequence.names) + 1) * PAGE_TOKENS <= sequence.num_cached:
            self._name_next(sequence)
            number = len(sequence.names) - 1
            self.pool.name(sequence.pages[number], sequence.names[number])
        if sequence.num_pending == 0 and sequence.request.adapter is not None:
            self._slot_rotation.drew(sequence.request.adapter, self._num_steps)

    def remove(self, sequence: Sequence) -> None:
        """It has ended or was cancelled."""
        if sequence in self.running:
            self._stop(sequence)
            self.waiting.stop(sequence.request.flow)
        elif any(other is sequence for other in self.waiting):
            self.waiting.remove(sequence.request.flow, sequence)

    def _make_way(self) -> None:
        """For the one that is next, if a place is all that it lacks."""
        first = next(self.waiting.in_order(), None)
        if first is None:
            return
        flow, sequence = first
        newest = self._newest_of_crowd(flow) if len(self.running) == self._max_sequences else None
        if newest is None or not self._would_fit(sequence, beside=newest):
            sequence.crowded_out_since = None
        elif sequence.crowded_out_since is None:
            sequence.crowded_out_since = self._num_steps
        elif self._num_steps - sequence.crowded_out_since >= MAX_STEPS_CROWDED_OUT:
            self._preempt(newest)

    def _find_starved(self) -> tuple[FlowKey, Sequence] | None:
        """All who need a slot lack one if the first of them does; if not, a larger one still may."""
        held = owners_of_adapters(self.running)
        needing: list[tuple[FlowKey, Sequence]] = []
        for key, sequence in self.waiting.in_order():
            if sequence.request.adapter in (None, *held):
                sequence.slotless_since = None
            else:
                needing.append((key, sequence))
        lacks = bool(needing) and not self._brings(needing[0][1].request.adapter)
        for key, sequence in needing:
            if sequence.slotless_since is None:
                sequence.slotless_since = self._num_steps if lacks else None
            elif self._num_steps - sequence.slotless_since >= MAX_STEPS_WITHOUT_SLOT:
                if not self._brings(sequence.request.adapter):
                    return key, sequence
                sequence.slotless_since = None
        return None

    def _give_up_slots(self, key: FlowKey, starved: Sequence) -> bool:
        """For the one that is starved, if pages and a share of the step's prompt tokens can be had with them. False: it
        has lacked pages as well for so long that nobody else may come in."""
        givers = self._slot_rotation.givers(self.running, owner=key[0], step=self._num_steps)
        leaving = [other for other in self.running if other.request.adapter in givers]
        kept = {page for s in self.running if s not in leaving for page in s.pages}
        freed = {page for s in leaving for page in s.pages} - kept
        num_pages = pages_for(len(starved.tokens) + 1)
        num_prompt = sum(s.num_pending for s in self.running if s.num_pending > 1 and s not in leaving)
        if self.pool.num_available + len(freed) < num_pages:
            assert starved.slotless_since is not None
            return self._num_steps - starved.slotless_since < 2 * MAX_STEPS_WITHOUT_SLOT
        for giver in givers if num_prompt < self._max_prefill_tokens else []:
            if self._brings(starved.request.adapter) and self.pool.num_available >= num_pages:
                break
            for other in reversed(leaving):  # so that the oldest is the first of its flow
                if other.request.adapter == giver:
                    self._preempt(other)
        return True

    def _newest_of_crowd(self, flow: FlowKey) -> Sequence | None:
        giver = self.waiting.crowded_beside(flow)
        return next((other for other in reversed(self.running) if other.request.flow == giver), None)

    def _would_fit(self, sequence: Sequence, *, beside: Sequence) -> bool:
        """In the place of the other: its pages and its adapter can be had."""
        if self.pool.num_available + len(beside.pages) < pages_for(len(sequence.tokens) + 1):
            return False
        return self._brings(sequence.request.adapter)

    def _brings(self, adapter: str | None) -> bool:
        """To the device, if it is not there and a slot can be had."""
        if adapter is None or self._adapters.is_on_device(adapter):
            return True
        if not self._adapters.acquire(adapter):
            return False
        self._adapters.release(adapter)
        return True

    def _admit(self, pieces: list[Piece], room: int) -> None:
        while room > 0 and len(self.running) < self._max_sequences:
            sequence = self._next()
            if sequence is None:
                return
            count = min(sequence.num_pending, room)
            has_room = self._make_room(sequence, count)
            assert has_room, "the pages were counted before it was let in"
            pieces.append(Piece(sequence, count))
            room -= count

    def _next(self) -> Sequence | None:
        """Lets one waiting sequence in: the first whose pages and adapter can be had. While one is starved for a slot,
        others come in that need none."""
        held = owners_of_adapters(self.running)
        for flow, sequence in self._in_turn():
            if sequence.request.adapter not in (None, *held) and not self._may_take_slot(sequence):
                continue
            found = self._find_prefix(sequence)
            kept = sum(1 for page in found if not self.pool.is_used(page))
            if self.pool.num_available - kept < pages_for(len(sequence.tokens) + 1) - len(found):
                return None  # whoever is next must not be passed over by smaller ones for ever
            adapter = sequence.request.adapter
            if adapter is not None:
                is_there = self._adapters.acquire(adapter)
                assert is_there, "others that run have it, or it was brought just now"
            for page in found:
                self.pool.share(page)
            sequence.pages = found
            sequence.names = sequence.names[: len(found)]
            sequence.num_cached = len(found) * PAGE_TOKENS
            if sequence.num_found is None:
                sequence.num_found = sequence.num_cached
                sequence.queued_s = time.monotonic() - sequence.added_at
            sequence.slotless_since = sequence.crowded_out_since = None
            if self._starved is not None and sequence is self._starved[1]:
                self._starved = None
            self.running.append(self.waiting.start(flow))
            return sequence
        return None

    def _may_take_slot(self, sequence: Sequence) -> bool:
        """It can have one, and nobody is starved for one, or it is."""
        is_its_turn = self._starved is None or sequence is self._starved[1]
        return is_its_turn and self._brings(sequence.request.adapter)

    def _in_turn(self) -> Iterator[tuple[FlowKey, Sequence]]:
        if self._starved is not None:
            yield self._starved
        yield from self.waiting.in_order()

    def _look_ahead(self) -> None:
        """The adapter whose turn is next goes to the device while others are computed."""
        for _, sequence in self._in_turn():
            if sequence.request.adapter is not None:
                self._brings(sequence.request.adapter)
                return

    def _find_prefix(self, sequence: Sequence) -> list[int]:
        """Pages in the cache that hold the sequence's beginning. At least its last token is computed anew: its logits
        are wanted."""
        found: list[int] = []
        if sequence.wants_prompt_logprobs:  # which the cache does not hold
            return found
        while (len(found) + 1) * PAGE_TOKENS < len(sequence.tokens):
            if len(sequence.names) == len(found):
                self._name_next(sequence)
            page = self.pool.find(sequence.names[len(found)])
            if page is None:
                break
            found.append(page)
        return found

    def _name_next(self, sequence: Sequence) -> None:
        start = len(sequence.names) * PAGE_TOKENS
        parent = sequence.names[-1] if sequence.names else sequence.salt
        sequence.names.append(page_name(parent, sequence.tokens[start : start + PAGE_TOKENS]))

    def _make_room(self, sequence: Sequence, count: int) -> bool:
        """Pages for `count` more tokens, if need be those of others. False: it had to give its own."""
        while len(sequence.pages) < pages_for(sequence.num_cached + count):
            page = self.pool.allocate()
            if page is not None:
                sequence.pages.append(page)
                continue
            giver = self._giver_of_pages()
            self._preempt(giver)
            if giver is sequence:
                return False
        return True

    def _giver_of_pages(self) -> Sequence:
        """The newest of the owner that has most pages, but never an owner's only one; else the newest of all. So the
        oldest goes on whatever happens."""
        num_pages: Counter[str] = Counter()
        by_owner: dict[str, list[Sequence]] = {}
        for other in self.running:
            owner = other.request.flow[0]
            num_pages[owner] += len(other.pages)
            by_owner.setdefault(owner, []).append(other)
        last = self.running[-1]
        several = [owner for owner, own in by_owner.items() if len(own) > 1]
        richest = max(several, key=lambda owner: num_pages[owner], default=last.request.flow[0])
        return by_owner[richest][-1] if num_pages[richest] > num_pages[last.request.flow[0]] else last

    def _preempt(self, sequence: Sequence) -> None:
        self.num_preemptions += 1
        self._stop(sequence)
        self.add(sequence, front=True)
        self.waiting.stop(sequence.request.flow)

    def _stop(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.pool.release(sequence.pages)
        sequence.pages, sequence.num_cached = [], 0
        adapter = sequence.request.adapter
        if adapter is not None:
            self._adapters.release(adapter)
            if adapter not in owners_of_adapters(self.running):
                self._slot_rotation.left(adapter)
