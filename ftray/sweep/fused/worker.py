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
from ftray.model.adapters.fused_lora import FusedLora
from ftray.model.base import prepare_base
from ftray.model.flops import count_flops, measure_gemm_rate
from ftray.model.hardware import choose_hardware, make_deterministic
from ftray.model.packed import PackedCausalLM, prepare_layers, register_packed_attention
from ftray.model.weights import load_weights
from ftray.objectives import make_loss, objective_of
from ftray.sweep.fused.group import FusedGroup, RowSharing
from ftray.sweep.fused.job import FusedJob
from ftray.sweep.fused.member import Member, make_member
from ftray.sweep.fused.memory import MemoryBudget
from ftray.sweep.fused.reporter import Assignment, GroupReporter, SilentReporter
from ftray.train.hooks.watchdog import Watchdog
from ftray.train.prepared_data import PreparedData, num_steps
from ftray.train.runs.rank_directory import directory_of_rank, local_copy
from ftray.train.step_record import FlopsMeter

WAIT_S = 0.2
Outcomes = dict[str, tuple[str, str | None]]  # by member that is over: finished, stopped or diverged, and why


def fused_worker(job: FusedJob) -> None:
    rank, world_size = ray.train.get_context().get_world_rank(), dist.get_world_size()
    use_gpu = job.base_run.workers.gpus_each > 0
    if use_gpu:
        torch.cuda.set_device(ray.train.torch.get_device())
    hardware = choose_hardware(use_gpu=use_gpu)
    make_deterministic(num_threads=job.base_run.workers.cpus_each)
    base = prepare_base(job.base_name, chat=job.base_run.chat)
    model = prepare_layers(load_weights(base, hardware, attention=register_packed_attention()), job.base_run.memory)
    ranks_per_node = ray.train.get_context().get_local_world_size()
    memory = MemoryBudget(model, job.adapters, hardware, world_size=world_size, ranks_per_node=ranks_per_node)
    fused = FusedLora(model)
    objective, loss = objective_of(job.base_run.objective), make_loss(job.base_run.objective)
    budget = job.base_run.batch.tokens_per_micro_batch
    sharing = RowSharing(job.shares_rows)
    group = FusedGroup(PackedCausalLM(model), fused, objective, loss, hardware, token_budget=budget, sharing=sharing)
    train_data = open_dataset(local_copy(job.train_data))
    eval_data = open_dataset(local_copy(job.eval_data)) if job.eval_data is not None else None
    data = PreparedData(train_data, eval_data, job.data_digest, num_steps(job.base_run, train_data))
    gemm_rate = measure_gemm_rate(hardware) * world_size
    meter = FlopsMeter(count_flops(model), gemm_rate, trains_base=False, reference=objective.needs_reference)
    reporter = GroupReporter(job, base, data, meter=meter) if rank == 0 else SilentReporter()
    reporter.log(memory.describe(slots=job.slots))
    directory = directory_of_rank(job.uri, rank, attempt=job.attempt)
    watchdog = Watchdog(directory, rank=rank, timeout_s=job.base_run.guard.hang_timeout_s)
    GroupTraining(job, group, fused, data, memory, reporter, watchdog).run()
    reporter.close()
    watchdog.close()


class GroupTraining:
    """Members come and go; between, all of them step together. The same on every rank: what is decided, rank 0 says."""

    def __init__(
        self,
        job: FusedJob,
        group: FusedGroup,
        fused: FusedLora,
        data: PreparedData,
        memory: MemoryBudget,
        reporter: GroupReporter | SilentReporter,
        watchdog: Watchdog,
    ):
        self._job = job
        self._group = group
        self._fused = fused
        self._data = data
        self._memory = memory
        self._reporter = reporter
        self._watchdog = watchdog
        self._members: list[Member] = []
        self._until: dict[str, int | None] = {}  # by member: where it waits for the others of its population
        self._has_trained = False

    def run(self) -> None:
        while True:
            self._watchdog.beat()
            more_to_come = self._admit()
            self._reporter.raise_failures()
            if self._members:
                self._settle(self._step())
            elif more_to_come:
                time.sleep(WAIT_S)
            else:
                return

    def _admit(self) -> bool:
        """Takes up as many runs as slots and memory are left for; whether there will be more later."""
        num_members = len(self._members)
        left = self._memory.left(num_members, has_trained=self._has_trained)
        begun, waits = agreed(self._reporter.take(min(self._job.slots - num_members, left)))
        for assignment in begun:
            checkpoint = local_copy(assignment.checkpoint) if assignment.checkpoint is not None else None
            try:
                member = join(assignment, checkpoint, self._fused, self._data.train)
            except FtrayError as error:  # the same on every rank: the member's own fault
                self._reporter.refuse(assignment.config.name, str(error))
            else:
                self._members.append(member)
                self._until[member.name] = assignment.until_step
                self._reporter.begin(member)
            self._watchdog.beat()
        return waits

    def _step(self) -> Outcomes:
        """One update of each, and the evaluations that are due; who is over by it."""
        self._has_trained = True
        over: Outcomes = {}
        running = [member for member in self._members if not member.is_done]
        for name, outcome in (self._group.step(running) if running else {}).items():
            if isinstance(outcome, str):
                over[name] = "diverged", f"{outcome}; lower optimizer.learning_rate"
            else:
                self._reporter.record(named(running, name), outcome)
        running = [member for member in running if member.name not in over]
        self._reporter.compare(self._group.sharing)
        due = [member for member in running if member.is_evaluated]
        if due and self._data.eval is not None:
            evaluated = self._group.evaluate(due, self._data.eval, on_row=self._watchdog.beat)
            for name, means in evaluated.items():
                self._reporter.evaluated(named(due, name), means)
        stopping = {*agreed(self._reporter.stopping(running))}
        stopping |= {member.name for member in running if self._has_come(member)}
        over |= {member.name: ("stopped", None) for member in running if member.name in stopping and not member.is_done}
        over |= {m.name: ("finished", None) for m in self._members if m.is_done and m.name not in over}
        self._save(running, over)
        return over

    def _save(self, running: list[Member], over: Outcomes) -> None:
        for member in running:
            if member.is_saved or member.name in over:
                self._watchdog.beat()
                self._reporter.save(member, must=member.is_done or self._has_come(member))

    def _settle(self, over: Outcomes) -> None:
        """Who is over leaves, and makes room."""
        for name, (outcome, message) in over.items():
            self._reporter.end(named(self._members, name), outcome, message)
            self._fused.remove(name)
        self._members = [member for member in self._members if member.name not in over]

    def _has_come(self, member: Member) -> bool:
        return member.step == self._until[member.name]


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
