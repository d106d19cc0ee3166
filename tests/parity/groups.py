"""Trains several runs side by side in one group on gloo ranks without Ray: the fused group of the product."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from ranks import Record, Trained, config_of, start_ranks


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
    records: Sequence[Record],
    policy_as_reference: bool = False,
) -> dict[str, dict[str, Any]]:
    from ftray.config.run import MemoryConfig
    from ftray.data.tokens import tokenize_source
    from ftray.model.adapters.fused_lora import FusedLora
    from ftray.model.base import load_tokenizer, prepare_base
    from ftray.model.chat import ChatRenderer
    from ftray.model.hardware import choose_hardware
    from ftray.model.packed import PackedCausalLM, prepare_layers, register_packed_attention
    from ftray.model.weights import load_weights
    from ftray.objectives import LogProbs, make_loss, objective_of
    from ftray.sweep.fused.group import FusedGroup, MemberStep
    from ftray.sweep.fused.member import make_member, save
    from ftray.train.checkpoints.listing import newest_whole_checkpoint

    configs = {}
    for record in records:
        config = config_of(record, base_directory=base_directory, train_file=train_file)
        configs[record.name] = config.model_copy(update={"name": record.name, "runs_dir": str(out / "runs")})
    base = prepare_base(base_directory)
    first = next(iter(configs.values()))
    data, objective = first.data, objective_of(first.objective)
    renderer = ChatRenderer(load_tokenizer(base))
    dataset = tokenize_source("data.train", data.train, data, renderer, shape=objective.shape)
    loss = whole = make_loss(first.objective)
    if policy_as_reference:
        loss = lambda logs, row: whole(LogProbs(logs.policy_N, logs.policy_N.detach()), row)  # noqa: E731
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
    group = FusedGroup(PackedCausalLM(model), fused, objective, loss, choose_hardware(), token_budget=token_budget)
    found = {
        member.name: {
            "losses": [],
            "grad_norms": [],
            "eval_losses": [],
            "eval_metrics": [],
            "start": {key: p.detach().clone() for key, p in member.parameters.items()},
            "checkpoint": "",
        }
        for member in members
    }
    while running := [m for m in members if not m.is_done and not (m.name == stop_early and m.step == 2)]:
        if share_a_norm:
            clip_together(running)
        for name, reported in group.step(running).items():
            assert isinstance(reported, MemberStep), reported
            found[name]["losses"].append(reported.loss)
            found[name]["grad_norms"].append(reported.grad_norm)
        due = [member for member in running if member.step % 2 == 0]
        for name, evaluated in (group.evaluate(due, dataset) if due else {}).items():
            found[name]["eval_losses"].append(evaluated.loss)
            found[name]["eval_metrics"].append(evaluated.metrics)
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
