"""The training loop, driven whole by a fake engine: what it calls, when, and in which order."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from fake_engine import FakeEngine

from ftray.config.run import GuardConfig
from ftray.data.dataset import RowCounts, TokenizedDataset
from ftray.data.examples import DatasetSource, ExampleSource
from ftray.data.pack import pack_all
from ftray.objectives import OBJECTIVES
from ftray.train.engine.protocol import TrainingEngine
from ftray.train.loop import Schedule, Training, evaluator, train
from ftray.train.loss_guard import LossGuard

LENGTHS = [3, 4, 5, 6]  # of its examples, the last two tokens of each trained; example i comes from row i + 1


class GivenUp(Exception):
    pass


class Kept:
    """Callbacks that write down what they were asked, in one list with the engine's calls."""

    def __init__(self, calls: list, *, stop_at: int | None = None):
        self.calls = calls
        self.records: list = []
        self._stop_at = stop_at

    def on_bad_loss(self, step, problem, rows):
        self.calls.append(("bad", step, problem, rows))
        raise GivenUp

    def on_step_end(self, record):
        self.records.append(record)
        self.calls.append(("end", record.step))

    def on_evaluated(self, step, evaluated):
        self.calls.append(("evaluated", step, evaluated.loss))

    def save(self, step):
        self.calls.append(("save", step))

    def should_stop(self, step):
        return step == self._stop_at


def dataset() -> TokenizedDataset:
    lengths = np.array(LENGTHS)
    trained = np.concatenate([[False] * (n - 2) + [True] * 2 for n in LENGTHS])
    return TokenizedDataset(
        ids=np.arange(sum(LENGTHS), dtype=np.int32),
        trained=trained,
        sequence_lengths=lengths,
        rows=np.arange(1, len(lengths) + 1),
        trained_lengths=np.full(len(lengths), 2),
        sequences_per_example=1,
        row_counts=(RowCounts(len(lengths)),),
    )


def go(
    engine: FakeEngine,
    *,
    stop_at: int | None = None,
    evaluates: bool = False,
    epochs: int | None = None,
    source: ExampleSource | None = None,
    **schedule,
) -> tuple[int, Kept]:
    data = dataset()
    when = {"start_step": 0, "num_steps": 4, "evaluate_every": 2, "save_every": 3} | schedule
    length = {"epochs": epochs} if epochs is not None else {"max_steps": when["num_steps"]}
    training = Training(
        source or DatasetSource(data, examples_per_step=2, seed=0, shuffle=False, **length),
        Schedule(**when, learning_rate=lambda step: float(step + 1)),
        seed=0,
        token_budget=8,
        evaluate=evaluator(data, engine, token_budget=8) if evaluates else None,
    )
    kept = Kept(engine.calls, stop_at=stop_at)
    return train(engine, training, LossGuard(GuardConfig()), kept), kept


def names(calls: list) -> list:
    return [(call[0], call[1]) for call in calls if call[0] in ("end", "evaluated", "save", "bad")]


def test_the_fake_is_an_engine():
    engine: TrainingEngine = FakeEngine()
    assert engine.sum_over_ranks(2.0) == 2.0


def test_a_step_is_forward_backward_update_record():
    engine = FakeEngine()
    done, kept = go(engine, num_steps=2)
    assert done == 2
    assert engine.calls[:3] == [("forward_backward", 4, [7]), ("optim_step", 1.0), ("end", 1)]
    assert engine.calls[3:5] == [("forward_backward", 4, [6, 5]), ("optim_step", 2.0)]
    first = kept.records[0]
    assert (first.num_tokens, first.num_trained_tokens, first.loss, first.learning_rate) == (7, 4, 1.0, 1.0)


def test_a_step_over_the_budget_has_micro_batches():
    engine = FakeEngine()
    go(engine, num_steps=2)
    assert [call for call in engine.calls if call[0] == "forward_backward"][1] == ("forward_backward", 4, [6, 5])


def test_a_pair_or_example_is_what_an_objective_may_count():
    engine = FakeEngine(objective=OBJECTIVES["dpo"])
    go(engine, num_steps=1)
    assert engine.calls[0][:2] == ("forward_backward", 2)


def test_evaluation_comes_before_the_save_and_both_at_the_end():
    engine = FakeEngine()
    assert go(engine, evaluates=True)[0] == 4
    assert names(engine.calls) == [
        ("end", 1),
        ("end", 2),
        ("evaluated", 2),
        ("end", 3),
        ("save", 3),
        ("end", 4),
        ("evaluated", 4),
        ("save", 4),
    ]


def test_who_is_asked_to_stop_saves_and_ends():
    engine = FakeEngine()
    done, _ = go(engine, stop_at=2)
    assert done == 2
    assert names(engine.calls) == [("end", 1), ("end", 2), ("save", 2)]


def test_a_request_at_the_last_step_ends_nothing_earlier():
    assert go(FakeEngine(), stop_at=4)[0] == 4


def test_a_resumed_run_goes_on_with_its_step():
    engine = FakeEngine()
    engine.num_updates = 2
    assert go(engine, start_step=2)[0] == 4
    assert names(engine.calls) == [("end", 3), ("save", 3), ("end", 4), ("save", 4)]
    assert [call[1] for call in engine.calls if call[0] == "optim_step"] == [3.0, 4.0]


def test_workers_that_start_again_where_they_were_to_stop_do_no_more():
    engine = FakeEngine()
    assert go(engine, start_step=2, stop_at=2)[0] == 2
    assert engine.calls == []
    go(engine, start_step=2, stop_at=1)
    assert engine.calls != []


def test_a_skipped_step_is_not_trained_and_nothing_is_saved_before_there_is_a_state():
    engine = FakeEngine()
    go(engine, skipped=frozenset({0}), save_every=1)
    assert names(engine.calls) == [("end", 2), ("save", 2), ("end", 3), ("save", 3), ("end", 4), ("save", 4)]


def test_a_bad_loss_makes_no_update_and_names_its_rows():
    engine = FakeEngine(losses={2: math.nan})
    with pytest.raises(GivenUp):
        go(engine, num_steps=3)
    assert engine.calls[-1] == ("bad", 2, "the loss is nan", [3, 4])
    assert engine.num_updates == 1


def test_an_update_that_is_not_finite_is_told_too():
    engine = FakeEngine(grad_norms={1: math.inf})
    with pytest.raises(GivenUp):
        go(engine, num_steps=1)
    assert engine.calls[-1][:3] == ("bad", 1, "the gradient norm is inf")


@dataclass(frozen=True)
class Rollout:
    """An example that no dataset has, with what its objective reads beside the tokens."""

    number: int
    advantage: float
    row: int = 1
    length: int = 5
    num_trained: int = 3
    sequences: tuple = ((np.arange(5), np.array([False, False, True, True, True])),)

    @property
    def extras(self) -> dict[str, np.ndarray]:
        return {"advantages_N": np.full(self.num_trained, self.advantage, np.float32)}


class Rollouts:
    """A source of one file: what a step trains depends on its number alone."""

    num_steps, sequences_per_example, extras = 3, 1, ("advantages_N",)

    def step(self, number: int) -> list[Rollout]:
        return [Rollout(i, advantage=number + i / 10) for i in range(2)]


def test_examples_may_come_from_anywhere():
    engine = FakeEngine()
    assert go(engine, source=Rollouts(), num_steps=3)[0] == 3
    assert [call for call in engine.calls if call[0] == "forward_backward"] == [("forward_backward", 6, [5, 5])] * 3


def test_what_an_objective_reads_beside_the_tokens_is_packed_and_moved():
    source = Rollouts()
    whole, empty = (row.to(torch.device("cpu")) for row in pack_all(source, [source.step(1), []]))
    assert whole.extras["advantages_N"].tolist() == pytest.approx([1.0] * 3 + [1.1] * 3)
    assert len(whole.extras["advantages_N"]) == len(whole.rows_N)
    assert empty.extras["advantages_N"].tolist() == [0.0]  # of a rank that has no example in this micro-batch


def test_epochs_end_with_what_is_left():
    engine = FakeEngine()
    go(engine, epochs=3, num_steps=6)
    assert [call[1] for call in engine.calls if call[0] == "forward_backward"] == [4] * 6
