"""Runs trained side by side in one group, on one rank and on two, are those that the engine trains alone: the same
losses (rtol 1e-5: float32 sums in another order) and weights (1e-4 of the change), whatever the others do."""

from dataclasses import replace

import pytest
import torch
from groups import fused_on_ranks
from ranks import Record, Trained, train_on_ranks
from tiny import pair_rows, write_jsonl

LOSS_RTOL, WEIGHT_NORM = 1e-5, 1e-4
MEMBERS = [
    Record("small", steps=6, settings={"adapter": "{rank: 2, alpha: 4}", "seed": 3}),
    Record(
        "wide",
        steps=4,
        settings={
            "adapter": "{rank: 16, alpha: 8, targets: [q_proj, down_proj]}",
            "optimizer.learning_rate": 3e-3,
            "optimizer.schedule": "linear",
            "batch.examples_per_step": 5,
        },
    ),
    Record(
        "plus",
        steps=6,
        settings={
            "adapter": "{variant: rslora, rank: 4, alpha: 8}",
            "optimizer.lora_plus_ratio": 4,
            "optimizer.max_grad_norm": 0.05,
            "optimizer.weight_decay": 0.0,
        },
    ),
]


@pytest.fixture(scope="module")
def fixed(tiny_model, train_file):
    return {"base_directory": str(tiny_model), "train_file": str(train_file)}


@pytest.fixture(scope="module")
def alone(tmp_path_factory, fixed):
    return train_on_ranks(1, MEMBERS, tmp_path_factory.mktemp("alone"), **fixed)


def compare(found: dict[str, Trained], alone: dict[str, Trained], *, without: str | None = None) -> None:
    for name, expected in alone.items():
        if name == without:
            continue
        assert all(torch.equal(found[name].start[key], expected.start[key]) for key in expected.start)
        assert found[name].losses == pytest.approx(expected.losses, rel=LOSS_RTOL)
        assert found[name].eval_losses == pytest.approx(expected.eval_losses, rel=LOSS_RTOL)
        for ours, theirs in zip(found[name].eval_metrics, expected.eval_metrics, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
        assert found[name].grad_norms == pytest.approx(expected.grad_norms, rel=1e-4)
        assert found[name].change_from(expected) < WEIGHT_NORM


@pytest.mark.parametrize(
    ("world_size", "how"),
    [
        (1, {}),
        (2, {"token_budget": 150, "stop_early": "wide"}),
        (1, {"stop_early": "wide", "checkpointed": True}),
    ],
    ids=["one rank", "two ranks, small rows, one stopped early", "one stopped early, activations computed again"],
)
def test_members_of_a_group_are_the_runs_alone(world_size, how, fixed, alone, tmp_path):
    compare(fused_on_ranks(world_size, tmp_path, records=MEMBERS, **fixed, **how), alone, without=how.get("stop_early"))


def test_members_that_share_a_gradient_norm_are_found(fixed, alone, tmp_path):
    with pytest.raises(AssertionError):
        compare(fused_on_ranks(1, tmp_path, records=MEMBERS, **fixed, share_a_norm=True), alone)


@pytest.fixture(scope="module")
def preferences(tmp_path_factory, fixed):
    """Members that learn from pairs, of one beta and of rates and ranks of their own; and each alone."""
    out = tmp_path_factory.mktemp("preferences")
    settings = {"objective": "{type: dpo, beta: 0.2}", "data.train": str(write_jsonl(out / "p.jsonl", pair_rows(20)))}
    members = [
        Record("small", settings=settings),
        Record("wide", settings=settings | {"adapter": "{rank: 8, alpha: 8}", "optimizer.learning_rate": 3e-3}),
    ]
    return members, train_on_ranks(1, members, out, **fixed)


@pytest.mark.parametrize("world_size", [1, 2])
def test_members_that_learn_from_preferences_share_a_reference(world_size, fixed, preferences, tmp_path):
    members, alone = preferences
    compare(fused_on_ranks(world_size, tmp_path, **fixed, records=members), alone)


def test_a_reference_that_moves_with_the_adapters_is_found(fixed, preferences, tmp_path):
    members, alone = preferences
    with pytest.raises(AssertionError):
        compare(fused_on_ranks(1, tmp_path, **fixed, records=members, policy_as_reference=True), alone)


def test_a_member_goes_on_from_its_checkpoint_in_a_group_or_alone(fixed, alone, tmp_path):
    first = fused_on_ranks(1, tmp_path, records=MEMBERS, **fixed, save_at=2)
    rest = fused_on_ranks(1, tmp_path, records=MEMBERS, **fixed)  # the same directories
    for name, found in rest.items():
        assert found.losses == first[name].losses[2:]
        assert all(torch.equal(found.weights[key], first[name].weights[key]) for key in found.weights)
    checkpoint = str(tmp_path / "runs/small/checkpoints/step-2")
    record = replace(MEMBERS[0], resume_from=checkpoint)
    resumed = train_on_ranks(1, [record], tmp_path / "resumed", **fixed)["small"]
    assert resumed.losses == pytest.approx(alone["small"].losses[2:], rel=LOSS_RTOL)
    assert resumed.change_from(alone["small"]) < WEIGHT_NORM
