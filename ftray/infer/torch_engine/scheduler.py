"""Which sequences take part in the next step, with how many tokens.

Everything that runs goes first: a decoding sequence with its newest token, a prompt with its next piece (chunked
prefill, Agrawal et al. 2024, arXiv 2403.02310), so that a long prompt never stops the others. Then waiting ones come
in, as `fair_queue.py` orders them. When the cache is full the newest sequence, of who has most of it, gives its pages
back and waits at the front of its flow; its tokens are computed again later, or found in the cache. So do those who
have kept others out of a place or a slot for too long (`starvation.py`).
"""

import time
from collections import Counter
from typing import Protocol

from ftray.infer.fair_queue import FairQueue
from ftray.infer.torch_engine.kv_cache import PAGE_TOKENS, PagePool, page_name, pages_for
from ftray.infer.torch_engine.sequence import Piece, Sequence
from ftray.infer.torch_engine.slot_rotation import owners_of_adapters
from ftray.infer.torch_engine.starvation import DeviceAdapters, StarvationPolicy, can_bring


class RecurrentStates(Protocol):
    """`states.py`."""

    def __contains__(self, page_name: bytes) -> bool: ...
    def piece_of(self, sequence: Sequence, count: int) -> int: ...
    def restore(self, sequence: Sequence) -> None: ...


class Scheduler:
    def __init__(
        self,
        num_pages: int,
        *,
        max_sequences: int,
        max_prefill_tokens: int,
        adapters: DeviceAdapters,
        states: RecurrentStates | None = None,
    ):
        self._states = states
        self.pool = PagePool(num_pages)
        self.running: list[Sequence] = []  # in the order they came in
        self.waiting: FairQueue[Sequence] = FairQueue()
        self.num_preemptions = 0
        self._max_sequences = max_sequences
        self._max_prefill_tokens = max_prefill_tokens
        self._adapters = adapters
        self._starvation = StarvationPolicy(
            self.running,
            self.waiting,
            self.pool,
            adapters,
            max_sequences=max_sequences,
            max_prefill_tokens=max_prefill_tokens,
            preempt=self._preempt,
        )

    def add(self, sequence: Sequence, *, front: bool = False) -> None:
        self.waiting.push(sequence.request.flow, sequence, front=front, weight=sequence.request.priority)

    def plan(self) -> list[Piece]:
        pieces: list[Piece] = []
        room = self._max_prefill_tokens
        others_may_come = self._starvation.begin_step()
        preemptions = self.num_preemptions
        for sequence in list(self.running):
            is_prompt = sequence.num_pending > 1
            count = self._piece(sequence, room) if is_prompt else 1
            if count and sequence in self.running and self._make_room(sequence, count):
                pieces.append(Piece(sequence, count))
                room -= count if is_prompt else 0
        pieces = [piece for piece in pieces if piece.sequence in self.running]  # some may have given their pages up
        if self.num_preemptions == preemptions and others_may_come:
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
            self._starvation.drew(sequence.request.adapter)

    def compute_again(self, sequence: Sequence) -> None:
        """All of it: what is in the cache is no longer right."""
        sequence.names = []
        self._preempt(sequence)

    def remove(self, sequence: Sequence) -> None:
        """It has ended or was cancelled."""
        if sequence in self.running:
            self._stop(sequence)
            self.waiting.stop(sequence.request.flow)
        elif any(other is sequence for other in self.waiting):
            self.waiting.remove(sequence.request.flow, sequence)

    def _admit(self, pieces: list[Piece], room: int) -> None:
        while room > 0 and len(self.running) < self._max_sequences:
            sequence = self._next()
            if sequence is None:
                return
            count = self._piece(sequence, room)
            has_room = self._make_room(sequence, count)
            assert has_room, "the pages were counted before it was let in"
            pieces.append(Piece(sequence, count))
            room -= count

    def _piece(self, sequence: Sequence, room: int) -> int:
        """How many of its pending tokens come next."""
        count = min(sequence.num_pending, room)
        return count if self._states is None else self._states.piece_of(sequence, count)

    def _next(self) -> Sequence | None:
        """Lets one waiting sequence in: the first whose pages and adapter can be had. While one is starved for a slot,
        others come in that need none."""
        held = owners_of_adapters(self.running)
        for flow, sequence in self._starvation.in_turn():
            if sequence.request.adapter not in (None, *held) and not self._starvation.may_take_slot(sequence):
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
            if self._states is not None:
                self._states.restore(sequence)
            if sequence.num_found is None:
                sequence.num_found = sequence.num_cached
                sequence.queued_s = time.monotonic() - sequence.added_at
            self._starvation.admitted(sequence)
            self.running.append(self.waiting.start(flow))
            return sequence
        return None

    def _look_ahead(self) -> None:
        """The adapter whose turn is next goes to the device while others are computed."""
        for _, sequence in self._starvation.in_turn():
            if sequence.request.adapter is not None:
                can_bring(self._adapters, sequence.request.adapter)
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
        while found and self._states is not None and sequence.names[len(found) - 1] not in self._states:
            found.pop()
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
        sequence.pages, sequence.num_cached, sequence.states = [], 0, {}
        adapter = sequence.request.adapter
        if adapter is not None:
            self._adapters.release(adapter)
            if adapter not in owners_of_adapters(self.running):
                self._starvation.left(adapter)
