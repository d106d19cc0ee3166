"""Runs trained side by side in one group, on one rank and on two, are those that the engine trains alone: the same
losses (rtol 1e-5: float32 sums in another order) and weights (1e-4 of the change), whatever the others do."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Record, Trained, config_of, start_ranks, train_on_ranks
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


def fused_on_ranks(world_size: int, out: Path, **how: Any) -> dict[str, Trained]:
    out.mkdir(parents=True, exist_ok=True)
    start_ranks(run_rank, world_size, out, how)
    return {name: Trained(**found) for name, found in torch.load(out / "fused.pt").items()}


def run_rank(rank: int, world_size: int, port: int, out: Path, how: dict[str, Any]) -> None:
    import torch.distributed as dist

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), HF_HUB_OFFLINE="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), DS_ACCELERATOR="cpu")
    from ftray.model.hardware import make_deterministic

    make_deterministic(num_threads=1)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    found = run_group(out, **how)
    if rank == 0:
        torch.save(found, out / "fused.pt")
    dist.barrier()
    dist.destroy_process_group()


def run_group(
    out: Path,
    *,
    base_directory: str,
    train_file: str,
    token_budget: int = 4096,
    stop_early: str | None = None,
    save_at: int | None = None,
    checkpointed: bool = False,
    share_a_norm: bool = False,
    records: Sequence[Record] = MEMBERS,
    policy_as_reference: bool = False,
) -> dict[str, dict[str, Any]]:
    from ftray.config.run import MemoryConfig
    from ftray.data.tokens import tokenize_source
    from ftray.model.base import load_tokenizer, load_weights, prepare_base
    from ftray.model.chat import ChatRenderer
    from ftray.model.fused_lora import FusedLora
    from ftray.model.hardware import choose_hardware
    from ftray.model.packed import PackedCausalLM, prepare_layers, register_packed_attention
    from ftray.objectives import OBJECTIVES, LogProbs
    from ftray.sweep.fused_group import FusedGroup, MemberStep
    from ftray.sweep.member import make_member, save
    from ftray.train.checkpoint import newest_whole_checkpoint

    configs = {}
    for record in records:
        config = config_of(record, base_directory=base_directory, train_file=train_file)
        configs[record.name] = config.model_copy(update={"name": record.name, "runs_dir": str(out / "runs")})
    base = prepare_base(base_directory)
    first = next(iter(configs.values()))
    data, kind = first.data, first.objective.type
    dataset = tokenize_source("data.train", data.train, data, ChatRenderer(load_tokenizer(base)), objective=kind)
    objective = OBJECTIVES[kind](**first.objective.model_dump(exclude={"type"}))
    if policy_as_reference:
        real = objective.loss
        objective = replace(
            objective, loss=lambda logs, row: real(LogProbs(logs.policy_N, logs.policy_N.detach()), row)
        )
    model = load_weights(base, choose_hardware(), attention=register_packed_attention())
    prepare_layers(model, MemoryConfig(activation_checkpointing=checkpointed))
    fused = FusedLora(model)
    members = [
        make_member(
            config,
            fused.add(name, config.adapter, seed=config.seed),
            dataset,
            checkpoint=newest_whole_checkpoint(out / "runs" / name),
        )
        for name, config in configs.items()
    ]
    group = FusedGroup(PackedCausalLM(model), fused, objective, choose_hardware(), token_budget=token_budget)
    found = {
        member.name: {
            "losses": [],
            "grad_norms": [],
            "eval_losses": [],
            "start": {key: p.detach().clone() for key, p in member.parameters.items()},
            "checkpoint": "",
        }
        for member in members
    }
    while running := [m for m in members if not m.is_done and not (m.name == stop_early and m.step == 2)]:
        if share_a_norm:
            clip_together(running)
        for name, told in group.step(running, dataset).items():
            assert isinstance(told, MemberStep), told
            found[name]["losses"].append(told.loss)
            found[name]["grad_norms"].append(told.grad_norm)
        due = [member for member in running if member.step % 2 == 0]
        for name, loss in (group.evaluate(due, dataset) if due else {}).items():
            found[name]["eval_losses"].append(loss)
        for member in running:
            if member.step == save_at:
                save(member, base, data_digest="digest")
    for member in members:
        found[member.name]["weights"] = {key: p.detach().clone() for key, p in member.parameters.items()}
    return found


def clip_together(members: list[Any]) -> None:
    """The twin: one norm for all, as one optimizer over all adapters would have it."""
    for member in members:
        others = {f"{other.name}.{key}": p for other in members for key, p in other.parameters.items()}
        member.update = lambda member=member, others=others: broken_update(member, others)


def broken_update(member: Any, parameters: dict[str, Any]) -> float:
    own = member.parameters
    member.parameters = parameters
    norm = type(member).update(member)
    member.parameters = own
    return norm


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
    compare(fused_on_ranks(world_size, tmp_path, **fixed, **how), alone, without=how.get("stop_early"))


def test_members_that_share_a_gradient_norm_are_found(fixed, alone, tmp_path):
    with pytest.raises(AssertionError):
        compare(fused_on_ranks(1, tmp_path, **fixed, share_a_norm=True), alone)


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
    first = fused_on_ranks(1, tmp_path, **fixed, save_at=2)
    rest = fused_on_ranks(1, tmp_path, **fixed)  # the same directories
    for name, found in rest.items():
        assert found.losses == first[name].losses[2:]
        assert all(torch.equal(found.weights[key], first[name].weights[key]) for key in found.weights)
    checkpoint = str(tmp_path / "runs/small/checkpoints/step-2")
    record = replace(MEMBERS[0], resume_from=checkpoint)
    resumed = train_on_ranks(1, [record], tmp_path / "resumed", **fixed)["small"]
    assert resumed.losses == pytest.approx(alone["small"].losses[2:], rel=LOSS_RTOL)
    assert resumed.change_from(alone["small"]) < WEIGHT_NORM
