"""Which examples a step trains, and how ranks and micro-batches divide them.

Step k trains `order[k * B : (k + 1) * B]`, whatever the number of workers and the micro-batch. So loss curves agree
across world sizes, and the step number is the whole state of the sampler.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ftray.config.run import RunConfig

MicroBatch = list[int]  # example indices; empty where a rank has fewer than another


@dataclass(frozen=True)
class StepPlan:
    lengths: np.ndarray  # tokens of every example
    examples_per_step: int
    tokens_per_micro_batch: int
    seed: int
    shuffle: bool

    def num_steps(self, *, epochs: int | None, max_steps: int | None) -> int:
        """With epochs every example is trained exactly that often; the last step may be smaller."""
        if max_steps is not None:
            return max_steps
        assert epochs is not None
        return -(-epochs * len(self.lengths) // self.examples_per_step)

    def examples(self, step: int, *, end: int | None) -> list[int]:
        """`end`: positions of the order that exist (epochs x examples), or None when steps decide."""
        first = step * self.examples_per_step
        last = first + self.examples_per_step
        return [self._example_at(position) for position in range(first, last if end is None else min(last, end))]

    def _example_at(self, position: int) -> int:
        epoch, place = divmod(position, len(self.lengths))
        return int(self._order(epoch)[place])

    def _order(self, epoch: int) -> np.ndarray:
        return epoch_order(len(self.lengths), self.seed, epoch) if self.shuffle else np.arange(len(self.lengths))

    def divide(self, examples: Sequence[int], world_size: int) -> list[list[MicroBatch]]:
        """Per rank its micro-batches; every rank gets the same number of them, so that collectives match."""
        return divide(examples, self.lengths, world_size=world_size, token_budget=self.tokens_per_micro_batch)


def plan_steps(config: RunConfig, lengths: np.ndarray) -> StepPlan:
    return StepPlan(
        lengths=lengths,
        examples_per_step=config.batch.examples_per_step,
        tokens_per_micro_batch=config.batch.tokens_per_micro_batch,
        seed=config.seed,
        shuffle=config.data.shuffle,
    )


@lru_cache(maxsize=2)
def epoch_order(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_examples)


def divide(
    examples: Sequence[int], lengths: np.ndarray, *, world_size: int, token_budget: int
) -> list[list[MicroBatch]]:
    """Longest first to the rank with the fewest tokens, then first-fit into micro-batches under the budget."""
    by_length = sorted(examples, key=lambda i: (-lengths[i], i))
    shares: list[list[int]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for i in by_length:
        rank = loads.index(min(loads))
        shares[rank].append(i)
        loads[rank] += int(lengths[i])
    ranks = [first_fit(share, lengths, token_budget) for share in shares]
    most = max(len(batches) for batches in ranks)
    return [batches + [[] for _ in range(most - len(batches))] for batches in ranks]


def first_fit(examples: Sequence[int], lengths: np.ndarray, token_budget: int) -> list[MicroBatch]:
    batches: list[MicroBatch] = []
    room: list[int] = []
    for i in examples:
        place = next((b for b, left in enumerate(room) if left >= lengths[i]), None)
        if place is None:
            batches.append([])
            room.append(token_budget)
            place = len(batches) - 1
        batches[place].append(i)
        room[place] -= int(lengths[i])
    return batches
