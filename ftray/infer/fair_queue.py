"""Waiting sequences in one queue per flow, served by deficit round robin on tokens (Shreedhar and Varghese 1995): first
between owners, then between the flows of an owner. A tenant is an owner, its adapters are its flows, and many adapters
do not make a share larger. Where callers are unknown an adapter is an owner, and the users that requests name are its
flows.

How long an answer gets is not known when it is let in, so it is paid for afterwards: every token computed, prompt or
answer, is taken from the credit of its flow and of its owner, which may become a debt. Who is in debt waits while
others have credit; when all are in debt, all get whole quanta until one has credit. A flow with nothing waiting or
running is forgotten, and an owner without flows.
"""

from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

# Small: what is left of a flow's credit is what a newcomer waits for.
QUANTUM_TOKENS = 16

Item = TypeVar("Item")
FlowKey = tuple[str, str]  # owner, and which flow of it


@dataclass
class Flow(Generic[Item]):
    waiting: deque[Item] = field(default_factory=deque)
    num_running: int = 0
    credit: float = 0
    weight: float = 1

    @property
    def waits(self) -> bool:
        return bool(self.waiting)


@dataclass
class Owner(Generic[Item]):
    flows: OrderedDict[FlowKey, Flow[Item]] = field(default_factory=OrderedDict)  # the next to be served first
    credit: float = 0

    @property
    def waits(self) -> bool:
        return any(flow.waits for flow in self.flows.values())

    @property
    def num_running(self) -> int:
        return sum(flow.num_running for flow in self.flows.values())


class FairQueue(Generic[Item]):
    def __init__(self):
        self._owners: OrderedDict[str, Owner[Item]] = OrderedDict()  # the next to be served first

    def __len__(self) -> int:
        return sum(len(flow.waiting) for owner in self._owners.values() for flow in owner.flows.values())

    def __iter__(self) -> Iterator[Item]:
        flows = (flow for owner in self._owners.values() for flow in owner.flows.values())
        return (item for flow in flows for item in flow.waiting)

    def push(self, key: FlowKey, item: Item, *, front: bool = False, weight: float = 1) -> None:
        """`front`: it has run before, or belongs to one that runs. `weight`: a flow of 2 pays half for tokens."""
        flow = self._owners.setdefault(key[0], Owner()).flows.setdefault(key, Flow())
        flow.weight = weight
        if front:
            flow.waiting.appendleft(item)
        else:
            flow.waiting.append(item)

    def in_order(self) -> Iterator[tuple[FlowKey, Item]]:
        """The first of each waiting flow, in the order in which they may be let in. `start` or leave each."""
        for name in in_turn(self._owners):
            flows = self._owners[name].flows
            for key in in_turn(flows):
                yield key, flows[key].waiting[0]

    def start(self, key: FlowKey) -> Item:
        """Takes the flow's first item out to run. Another owner is next, and of this one another flow."""
        owner, flow = self._owners[key[0]], self._flow(key)
        flow.num_running += 1
        self._owners.move_to_end(key[0])
        owner.flows.move_to_end(key)
        return flow.waiting.popleft()

    def charge(self, key: FlowKey, num_tokens: int) -> None:
        flow = self._flow(key)
        flow.credit -= num_tokens / flow.weight
        self._owners[key[0]].credit -= num_tokens / flow.weight

    def stop(self, key: FlowKey) -> None:
        """One of the flow's running items has ended (or is pushed back)."""
        self._flow(key).num_running -= 1
        self._forget_if_idle(key)

    def remove(self, key: FlowKey, item: Item) -> None:
        self._flow(key).waiting.remove(item)
        self._forget_if_idle(key)

    def crowded_beside(self, key: FlowKey) -> FlowKey | None:
        """The flow that has most running, of the owner that has most, if `key`'s owner has none; else, if `key` has
        none, of its own owner. None where nobody has several."""
        own = self._owners[key[0]]
        richest = own if own.num_running else max(self._owners.values(), key=lambda owner: owner.num_running)
        if self._flow(key).num_running or richest.num_running < 2:
            return None
        giver = max(richest.flows, key=lambda flow: richest.flows[flow].num_running)
        return giver if richest is not own or richest.flows[giver].num_running > 1 else None

    def _flow(self, key: FlowKey) -> Flow[Item]:
        return self._owners[key[0]].flows[key]

    def _forget_if_idle(self, key: FlowKey) -> None:
        flow, flows = self._flow(key), self._owners[key[0]].flows
        if not flow.waiting and not flow.num_running:
            del flows[key]
        if not flows:
            del self._owners[key[0]]


def in_turn(owners: Mapping[Any, Any]) -> list[Any]:
    """Names of those that wait (owners, or flows): with credit in turn, then, for places that none of them can take,
    those in debt."""
    waiting = [name for name, owner in owners.items() if owner.waits]
    if waiting and all(owners[name].credit <= 0 for name in waiting):
        best = max(owners[name].credit for name in waiting)
        for name in waiting:
            owners[name].credit += QUANTUM_TOKENS * (1 + -best // QUANTUM_TOKENS)
    in_credit = [name for name in waiting if owners[name].credit > 0]
    in_debt = [name for name in waiting if owners[name].credit <= 0]
    return [*in_credit, *sorted(in_debt, key=lambda name: -owners[name].credit)]
