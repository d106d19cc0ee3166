"""What every worker of a fused group runs. Rank 0 speaks with the coordinator, which knows the study, and writes the
members' run directories; the others follow what it says."""

import time
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from ftray.data.dataset import TokenizedDataset, open_dataset
from ftray.errors import FtrayError
from ftray.model.base import prepare_base
from ftray.model.flops import count_flops, measure_gemm_rate
from ftray.model.fused_lora import FusedLora
from ftray.model.hardware import choose_hardware, make_deterministic
from ftray.model.packed import PackedCausalLM, prepare_layers, register_packed_attention
from ftray.model.weights import load_weights
from ftray.objectives import OBJECTIVES
from ftray.sweep.fused.group import FusedGroup, RowSharing
from ftray.sweep.fused.job import FusedJob
from ftray.sweep.fused.member import Member, make_member
from ftray.sweep.fused.memory import MemoryBudget
from ftray.sweep.fused.reporter import Assignment, GroupReporter
from ftray.train.hooks.watchdog import Watchdog
from ftray.train.runs.finalize import PreparedData
from ftray.train.runs.store import directory_of_rank, local_copy

WAIT_S = 0.2


def fused_worker(job: FusedJob) -> None:
    rank = ray.train.get_context().get_world_rank()
    use_gpu = job.base_run.workers.gpus_each > 0
    if use_gpu:
        torch.cuda.set_device(ray.train.torch.get_device())
    hardware = choose_hardware(use_gpu=use_gpu)
    make_deterministic(num_threads=job.base_run.workers.cpus_each)
    base = prepare_base(job.base_name)
    model = prepare_layers(load_weights(base, hardware, attention=register_packed_attention()), job.base_run.memory)
    ranks_per_node = ray.train.get_context().get_local_world_size()
    room = MemoryBudget(model, job.adapters, hardware, world_size=dist.get_world_size(), ranks_per_node=ranks_per_node)
    fused = FusedLora(model)
    objective = OBJECTIVES[job.base_run.objective.type](**job.base_run.objective.model_dump(exclude={"type"}))
    budget = job.base_run.batch.tokens_per_micro_batch
    sharing = RowSharing(job.shares_rows)
    group = FusedGroup(PackedCausalLM(model), fused, objective, hardware, token_budget=budget, sharing=sharing)
    train_data = open_dataset(local_copy(job.train_data))
    eval_data = open_dataset(local_copy(job.eval_data)) if job.eval_data is not None else None
    data = PreparedData(train_data, eval_data, job.data_digest)
    flops, rate = count_flops(model), measure_gemm_rate(hardware) * dist.get_world_size()
    reporter = GroupReporter(job, base, data, flops=flops, rate=rate) if rank == 0 else None
    members: list[Member] = []
    until: dict[str, int | None] = {}  # by member: where it waits for the others of its population
    has_trained = False
    if reporter is not None:
        reporter.log(room.describe(slots=job.slots))
    directory = directory_of_rank(job.url, rank, attempt=job.attempt) if job.url is not None else job.directory
    watchdog = Watchdog(directory, rank=rank, timeout_s=job.base_run.guard.hang_timeout_s)
    while True:
        watchdog.beat()
        count = min(job.slots - len(members), room.left(len(members), has_trained=has_trained))
        begun, waits = agreed(reporter.take(count) if reporter is not None else None)
        for assignment in begun:
            checkpoint = local_copy(assignment.checkpoint) if assignment.checkpoint is not None else None
            try:
                members.append(join(assignment, checkpoint, fused, train_data))
                until[members[-1].name] = assignment.until_step
            except FtrayError as error:  # the same on every rank: the member's own fault
                if reporter is not None:
                    reporter.refuse(assignment.config.name, str(error))
            else:
                if reporter is not None:
                    reporter.begin(members[-1])
            watchdog.beat()
        if reporter is not None:
            reporter.raise_failures()
        if not members and waits:
            time.sleep(WAIT_S)
            continue
        if not members:
            break
        has_trained = True
        over: dict[str, tuple[str, str | None]] = {}
        running = [member for member in members if not member.is_done]
        for name, reported in (group.step(running, train_data) if running else {}).items():
            if isinstance(reported, str):
                over[name] = "diverged", f"{reported}; lower optimizer.learning_rate"
            elif reporter is not None:
                reporter.record(named(members, name), reported)
        running = [member for member in running if member.name not in over]
        if reporter is not None:
            reporter.compare(sharing)
        due = [member for member in running if member.is_evaluated]
        losses = group.evaluate(due, eval_data, on_row=watchdog.beat) if due and eval_data is not None else {}
        for name, loss in losses.items():
            if reporter is not None:
                reporter.evaluated(named(members, name), loss)
        stopping = agreed(reporter.stopping(running) if reporter is not None else None)
        stopping += [member.name for member in running if member.step == until[member.name]]
        over |= {name: ("stopped", None) for name in stopping if not named(members, name).is_done}
        for member in [member for member in members if member.name in over or member.is_done]:
            over.setdefault(member.name, ("finished", None))
        if reporter is not None:
            for member in running:
                if member.is_saved or member.name in over:
                    watchdog.beat()
                    reporter.save(member, must=member.is_done or member.step == until[member.name])
            for name, (outcome, message) in over.items():
                reporter.end(named(members, name), outcome, message)
        for name in over:
            fused.remove(name)
        members = [member for member in members if member.name not in over]
    if reporter is not None:
        reporter.close()
    watchdog.close()


def join(assignment: Assignment, checkpoint: Path | None, fused: FusedLora, dataset: TokenizedDataset) -> Member:
    """Raises `FtrayError` where its adapter cannot be made."""
    config = assignment.config
    assert config.adapter is not None
    parameters = fused.add(config.name, config.adapter, seed=config.seed)
    return make_member(config, parameters, dataset, checkpoint=checkpoint, earlier_losses=assignment.earlier_losses)


def named(members: list[Member], name: str) -> Member:
    return next(member for member in members if member.name == name)


def agreed(value: Any) -> Any:
    """Rank 0's, on every rank."""
    if dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
