"""Waiting sequences in one queue per flow, served by deficit round robin on tokens (Shreedhar and Varghese 1995).

How long an answer gets is not known when it is let in, so a flow pays afterwards: every token computed for it, prompt
or answer, is taken from its credit, which may become a debt. A flow in debt waits while others have credit; when
all are in debt, all get whole quanta until one has credit. A flow with nothing waiting or running is forgotten.
"""

from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

# Small: what is left of a flow's credit is what a newcomer waits for.
QUANTUM_TOKENS = 16

Item = TypeVar("Item")
FlowKey = tuple[str, str]  # tenant, adapter


@dataclass
class Flow(Generic[Item]):
    waiting: deque[Item] = field(default_factory=deque)
    num_running: int = 0
    credit: float = 0
    weight: float = 1


class FairQueue(Generic[Item]):
    def __init__(self):
        self._flows: OrderedDict[FlowKey, Flow[Item]] = OrderedDict()  # the next to be served first

    def __len__(self) -> int:
        return sum(len(flow.waiting) for flow in self._flows.values())

    def __iter__(self) -> Iterator[Item]:
        return (item for flow in self._flows.values() for item in flow.waiting)

    def push(self, key: FlowKey, item: Item, *, front: bool = False, weight: float = 1) -> None:
        """`front`: it has run before, or belongs to one that runs. `weight`: a flow of 2 pays half for tokens."""
        flow = self._flows.setdefault(key, Flow())
        flow.weight = weight
        if front:
            flow.waiting.appendleft(item)
        else:
            flow.waiting.append(item)

    def in_order(self) -> Iterator[tuple[FlowKey, Item]]:
        """The first of each waiting flow, in the order in which they may be let in: those with credit in turn, then,
        for places that none of them can take, those in debt. `start` or leave each."""
        waiting = [key for key, flow in self._flows.items() if flow.waiting]
        if waiting and all(self._flows[key].credit <= 0 for key in waiting):
            best = max(self._flows[key].credit for key in waiting)
            for key in waiting:
                self._flows[key].credit += QUANTUM_TOKENS * (1 + -best // QUANTUM_TOKENS)
        in_credit = [key for key in waiting if self._flows[key].credit > 0]
        in_debt = [key for key in waiting if self._flows[key].credit <= 0]
        for key in [*in_credit, *sorted(in_debt, key=lambda key: -self._flows[key].credit)]:
            yield key, self._flows[key].waiting[0]

    def start(self, key: FlowKey) -> Item:
        """Takes the flow's first item out to run. Another flow is next."""
        flow = self._flows[key]
        flow.num_running += 1
        self._flows.move_to_end(key)
        return flow.waiting.popleft()

    def charge(self, key: FlowKey, num_tokens: int) -> None:
        self._flows[key].credit -= num_tokens / self._flows[key].weight

    def stop(self, key: FlowKey) -> None:
        """One of the flow's running items has ended (or is pushed back)."""
        self._flows[key].num_running -= 1
        self._forget_if_idle(key)

    def remove(self, key: FlowKey, item: Item) -> None:
        self._flows[key].waiting.remove(item)
        self._forget_if_idle(key)

    def _forget_if_idle(self, key: FlowKey) -> None:
        flow = self._flows[key]
        if not flow.waiting and not flow.num_running:
            del self._flows[key]
