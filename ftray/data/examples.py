"""Where a run's examples come from, step by step. The step number is the whole state of a source: a run that resumes
asks for the next one, whatever the number of workers and the micro-batch, so loss curves agree across world sizes.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np

from ftray.config.run import RunConfig
from ftray.data.dataset import TokenizedDataset
from ftray.errors import DataError


class Example(Protocol):
    """What a step counts: one sequence of a conversation or document, the chosen and the rejected one of a pair."""

    @property
    def number(self) -> int:
        """In its source; of several that are equally long the lower comes first."""
        ...

    @property
    def row(self) -> int:
        """Of the user's data, 1 for the first: a bad loss names it."""
        ...

    @property
    def length(self) -> int:
        """Tokens."""
        ...

    @property
    def num_trained(self) -> int:
        """Tokens that are trained and have one before them to be predicted from: the targets."""
        ...

    @property
    def sequences(self) -> Sequence[tuple[np.ndarray, np.ndarray]]:
        """(ids [T], trained [T]) of each."""
        ...

    @property
    def extras(self) -> Mapping[str, np.ndarray]:
        """What else its objective reads, by name: `..._N` has a value for each target, `..._S` for each sequence."""
        ...


class ExampleSource(Protocol):
    """A dataset, a mixture, rollouts."""

    @property
    def num_steps(self) -> int: ...

    @property
    def sequences_per_example(self) -> int: ...

    @property
    def extras(self) -> tuple[str, ...]:
        """Names of what each example has."""
        ...

    def step(self, number: int) -> Sequence[Example]:
        """Of a step, 0 for the first, over all ranks: every rank gets them all and reads its share."""
        ...


class DatasetExample:
    """Read when it is looked at."""

    __slots__ = ("_dataset", "number")
    extras: Mapping[str, np.ndarray] = {}

    def __init__(self, dataset: TokenizedDataset, number: int):
        self._dataset = dataset
        self.number = number

    @property
    def row(self) -> int:
        return int(self._dataset.rows[self.number])

    @property
    def length(self) -> int:
        return int(self._dataset.lengths[self.number])

    @property
    def num_trained(self) -> int:
        return int(self._dataset.trained_lengths[self.number])

    @property
    def sequences(self) -> list[tuple[np.ndarray, np.ndarray]]:
        return self._dataset.sequences(self.number)


def examples_of(dataset: TokenizedDataset, numbers: Sequence[int] | None = None) -> list[DatasetExample]:
    """All of them, or those."""
    return [DatasetExample(dataset, number) for number in (range(len(dataset)) if numbers is None else numbers)]


class DatasetSource:
    """Step k has `order[k * B : (k + 1) * B]`; each epoch has an order of its own."""

    extras: tuple[str, ...] = ()

    def __init__(
        self,
        dataset: TokenizedDataset,
        *,
        examples_per_step: int,
        seed: int,
        shuffle: bool,
        epochs: int | None = None,
        max_steps: int | None = None,
    ):
        """With `epochs` every example comes exactly that often, and the last step may be smaller; else there are
        `max_steps`."""
        assert (epochs is None) != (max_steps is None)
        self._dataset = dataset
        self._examples_per_step = examples_per_step
        self._seed = seed
        self._shuffle = shuffle
        self._end = None if epochs is None else epochs * len(dataset)  # positions of the order that exist
        self._max_steps = max_steps

    @property
    def sequences_per_example(self) -> int:
        return self._dataset.sequences_per_example

    @property
    def num_steps(self) -> int:
        if self._end is None:
            assert self._max_steps is not None
            return self._max_steps
        return -(-self._end // self._examples_per_step)

    def step(self, number: int) -> list[DatasetExample]:
        first = number * self._examples_per_step
        last = first + self._examples_per_step
        positions = range(first, last if self._end is None else min(last, self._end))
        return examples_of(self._dataset, [self._at(position) for position in positions])

    def _at(self, position: int) -> int:
        epoch, place = divmod(position, len(self._dataset))
        return int(epoch_order(len(self._dataset), self._seed, epoch)[place]) if self._shuffle else place


MIXED = 1  # in the seeds of a mixture's orders, which are not those of one source


class MixtureSource(DatasetSource):
    """Several sources by weight: an epoch has as many examples as the set, of each source its share, mixed.

    A source's examples come in an order of their own that goes on from epoch to epoch: each comes as often as every
    other of it, give or take one. All of it follows from the position in the run.
    """

    def __init__(self, dataset: TokenizedDataset, weights: Sequence[float], *, seed: int, **how):
        """`weights`: of the sources, relative to each other. Raises `DataError` for one that draws nothing."""
        super().__init__(dataset, seed=seed, shuffle=True, **how)
        self._members = [dataset.examples_of_source(number) for number in range(len(weights))]
        self._counts = shares(weights, len(dataset))
        for name, count in zip(dataset.names, self._counts, strict=True):
            if count == 0:
                raise DataError(f"data.train: the weight of {name} is too small: an epoch draws none of its examples")
        self._mixed = lru_cache(maxsize=2)(self._mix)

    def _at(self, position: int) -> int:
        epoch, place = divmod(position, len(self._dataset))
        return int(self._mixed(epoch)[place])

    def _mix(self, epoch: int) -> np.ndarray:
        """The examples of an epoch, in their order."""
        drawn = [self._drawn(number, epoch * count, count) for number, count in enumerate(self._counts)]
        together = np.concatenate(drawn)
        return together[np.random.default_rng([self._seed, epoch, MIXED]).permutation(len(together))]

    def _drawn(self, source: int, first: int, count: int) -> np.ndarray:
        """From `first` on in the source's own endless order."""
        members = self._members[source]
        rounds = range(first // len(members), -(-(first + count) // len(members)))
        orders = [np.random.default_rng([self._seed, source, number, MIXED]).permutation(members) for number in rounds]
        start = first - rounds.start * len(members)
        return np.concatenate(orders)[start : start + count]


def shares(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers that add up to `total`, by largest remainder."""
    exact = np.asarray(weights, np.float64) / sum(weights) * total
    counts = np.floor(exact).astype(int)
    for number in np.argsort(counts - exact, kind="stable")[: total - counts.sum()]:
        counts[number] += 1
    return counts.tolist()


def dataset_source(config: RunConfig, dataset: TokenizedDataset) -> DatasetSource:
    """What a run goes through. Raises `DataError` for a weight that draws nothing."""
    length = {"epochs": config.epochs, "max_steps": config.max_steps}
    how = {"examples_per_step": config.batch.examples_per_step, "seed": config.seed, **length}
    weights = [source.weight for source in config.data.training_sources if source.weight is not None]
    if weights:
        return MixtureSource(dataset, weights, **how)
    return DatasetSource(dataset, shuffle=config.data.shuffle, **how)


@lru_cache(maxsize=2)
def epoch_order(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_examples)
