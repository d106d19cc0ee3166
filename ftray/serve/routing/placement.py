"""Which replicas a request should try first: those that have its adapter in memory, unless they are busy."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ReplicaView:
    """A replica as a router sees it, a moment ago."""

    id: str
    adapters: frozenset[str]  # in its memory
    num_requests: int


def ranked(adapter: str | None, replicas: Sequence[ReplicaView], *, spread_at: int) -> list[list[str]]:
    """Ids in groups, the best group first.

    A cold adapter has a home, the same for every router, so that its first requests do not load it everywhere. Once all
    of the replicas that have it run `spread_at` requests or more, it spreads to the least loaded one.
    """
    by_load = sorted(replicas, key=lambda replica: replica.num_requests)
    if adapter is None:
        return [[replica.id for replica in by_load[:2]], [replica.id for replica in by_load[2:]]]
    warm = [replica for replica in by_load if adapter in replica.adapters]
    preferred = warm or [max(replicas, key=lambda replica: home_score(adapter, replica.id))]
    if preferred[0].num_requests >= spread_at:
        preferred = by_load[:1]
    best = [replica.id for replica in preferred[:2]]
    return [best, [replica.id for replica in by_load if replica.id not in best]]


def home_score(adapter: str, replica: str) -> bytes:
    """Rendezvous hashing (Thaler and Ravishankar 1998): replicas that come or go move few homes."""
    return hashlib.blake2b(f"{adapter}\0{replica}".encode(), digest_size=8).digest()
