"""How a step's examples are divided among ranks and micro-batches."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

from ftray.data.examples import Example

E = TypeVar("E", bound=Example)


def divide(examples: Iterable[E], *, world_size: int, token_budget: int) -> list[list[list[E]]]:
    """Per rank its micro-batches; every rank gets the same number of them, empty ones among them, so that collectives
    match. Longest first to the rank with the fewest tokens, then first-fit into micro-batches under the budget."""
    by_length = sorted(examples, key=lambda example: (-example.length, example.number))
    shares: list[list[E]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for example in by_length:
        rank = loads.index(min(loads))
        shares[rank].append(example)
        loads[rank] += example.length
    ranks = [first_fit(share, token_budget) for share in shares]
    most = max(len(batches) for batches in ranks)
    return [batches + [[] for _ in range(most - len(batches))] for batches in ranks]


def first_fit(examples: Sequence[E], token_budget: int) -> list[list[E]]:
    batches: list[list[E]] = []
    room: list[int] = []
    for example in examples:
        length = example.length
        place = next((b for b, left in enumerate(room) if left >= length), None)
        if place is None:
            batches.append([])
            room.append(token_budget)
            place = len(batches) - 1
        batches[place].append(example)
        room[place] -= length
    return batches
