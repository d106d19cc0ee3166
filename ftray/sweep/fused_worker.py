"""What every worker of a fused group runs. Rank 0 speaks with the desk, which knows the study, and writes the members'
run directories; the others follow what it says."""

import contextlib
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from ftray.config import RunConfig
from ftray.data.dataset import TokenizedDataset, open_dataset
from ftray.errors import FtrayError
from ftray.model.base import load_weights, prepare_base
from ftray.model.flops import count_flops, measure_gemm_rate
from ftray.model.fused_lora import FusedLora
from ftray.model.hardware import choose_hardware, make_deterministic
from ftray.model.packed import PackedCausalLM, prepare_layers, register_packed_attention
from ftray.objectives import OBJECTIVES
from ftray.sweep.fused_group import FusedGroup, MemberStep, RowSharing
from ftray.sweep.fused_job import FusedJob
from ftray.sweep.member import Member, make_member, save
from ftray.sweep.member_room import MemberRoom
from ftray.sweep.trial_run import Reporter, drop_checkpoints
from ftray.sweep.trials import Report
from ftray.tracking.events import record_event
from ftray.tracking.metrics import read_metrics
from ftray.train.callbacks import SAVE_FAILED
from ftray.train.checkpoint import newest_whole_checkpoint, read_state
from ftray.train.finish import PreparedData, finish, num_steps
from ftray.train.guard import WINDOW_STEPS
from ftray.train.job import STOP_REQUEST
from ftray.train.loop import StepRecord, peak_memory_gib
from ftray.train.recording import Recorder
from ftray.train.run_directory import check_same_data, open_run_directory
from ftray.train.watchdog import Watchdog

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
    room = MemberRoom(model, job.adapters, hardware, world_size=dist.get_world_size(), ranks_per_node=ranks_per_node)
    fused = FusedLora(model)
    objective = OBJECTIVES[job.base_run.objective.type](**job.base_run.objective.model_dump(exclude={"type"}))
    budget = job.base_run.batch.tokens_per_micro_batch
    sharing = RowSharing(job.shares_rows)
    group = FusedGroup(PackedCausalLM(model), fused, objective, hardware, token_budget=budget, sharing=sharing)
    train_data = open_dataset(job.train_data)
    eval_data = open_dataset(job.eval_data) if job.eval_data is not None else None
    data = PreparedData(train_data, eval_data, job.data_digest)
    flops, rate = count_flops(model), measure_gemm_rate(hardware) * dist.get_world_size()
    clerk = Clerk(job, base, data, flops=flops, rate=rate) if rank == 0 else None
    members: list[Member] = []
    until: dict[str, int | None] = {}  # by member: where it waits for the others of its population
    has_trained = False
    if clerk is not None:
        clerk.say(room.describe(slots=job.slots))
    watchdog = Watchdog(job.directory, rank=rank, timeout_s=job.base_run.guard.hang_timeout_s)
    while True:
        watchdog.beat()
        count = min(job.slots - len(members), room.left(len(members), has_trained=has_trained))
        begun, waits = agreed(clerk.take(count) if clerk is not None else None)
        for assignment in begun:
            try:
                members.append(join(assignment, fused, train_data))
                until[members[-1].name] = assignment.until_step
            except FtrayError as error:  # the same on every rank: the member's own fault
                if clerk is not None:
                    clerk.refuse(assignment.config.name, str(error))
            else:
                if clerk is not None:
                    clerk.begin(members[-1])
            watchdog.beat()
        if clerk is not None:
            clerk.raise_failures()
        if not members and waits:
            time.sleep(WAIT_S)
            continue
        if not members:
            break
        has_trained = True
        over: dict[str, tuple[str, str | None]] = {}
        running = [member for member in members if not member.is_done]
        for name, told in (group.step(running, train_data) if running else {}).items():
            if isinstance(told, str):
                over[name] = "diverged", f"{told}; lower optimizer.learning_rate"
            elif clerk is not None:
                clerk.record(named(members, name), told)
        running = [member for member in running if member.name not in over]
        if clerk is not None:
            clerk.compare(sharing)
        due = [member for member in running if member.is_evaluated]
        losses = group.evaluate(due, eval_data, on_row=watchdog.beat) if due and eval_data is not None else {}
        for name, loss in losses.items():
            if clerk is not None:
                clerk.evaluated(named(members, name), loss)
        stopping = agreed(clerk.stopping(running) if clerk is not None else None)
        stopping += [member.name for member in running if member.step == until[member.name]]
        over |= {name: ("stopped", None) for name in stopping if not named(members, name).is_done}
        for member in [member for member in members if member.name in over or member.is_done]:
            over.setdefault(member.name, ("finished", None))
        if clerk is not None:
            for member in running:
                if member.is_saved or member.name in over:
                    watchdog.beat()
                    clerk.save(member, must=member.is_done or member.step == until[member.name])
            for name, (outcome, message) in over.items():
                clerk.end(named(members, name), outcome, message)
        for name in over:
            fused.remove(name)
        members = [member for member in members if member.name not in over]
    if clerk is not None:
        clerk.close()
    watchdog.close()


@dataclass(frozen=True)
class Assignment:
    """A run to take up, as rank 0 found it: a shared disk may show another rank another newest checkpoint."""

    config: RunConfig
    checkpoint: Path | None
    earlier_losses: tuple[float, ...]
    until_step: int | None


def join(assignment: Assignment, fused: FusedLora, dataset: TokenizedDataset) -> Member:
    """Raises `FtrayError` where its adapter cannot be made."""
    config = assignment.config
    assert config.adapter is not None
    parameters = fused.add(config.name, config.adapter, seed=config.seed)
    return make_member(
        config, parameters, dataset, checkpoint=assignment.checkpoint, earlier_losses=assignment.earlier_losses
    )


def named(members: list[Member], name: str) -> Member:
    return next(member for member in members if member.name == name)


def agreed(value: Any) -> Any:
    """Rank 0's, on every rank."""
    if dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


class Clerk:
    """Rank 0's paperwork: the desk, and the members' run directories."""

    def __init__(self, job: FusedJob, base: Any, data: PreparedData, *, flops: Any, rate: float):
        self._job = job
        self._base = base
        self._data = data
        self._flops = flops
        self._rate = rate
        self._reporters: dict[str, Reporter] = {}
        self._asked: set[str] = set()  # names of members that are to stop
        self._began: dict[str, float] = {}
        self._told_sharing = job.shares_rows is not None  # an earlier part of the sweep has told it
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="finish")
        self._finishing: list[Future[None]] = []
        ray.get(job.desk.start_over.remote(job.group))  # what its workers before these had begun

    def take(self, count: int) -> tuple[list[Assignment], bool]:
        """What the desk has, and whether it will have more. A run that has come to its end already, which was not
        noted, is told and not taken up."""
        if count <= 0:
            return [], True
        taken: Any = ray.get(self._job.desk.take.remote(self._job.group, count))
        found = [self._assignment(RunConfig.model_validate_json(text), taken.until_step) for text in taken.runs]
        return [assignment for assignment in found if assignment is not None], taken.waits or bool(taken.runs)

    def _assignment(self, config: RunConfig, until_step: int | None) -> Assignment | None:
        try:
            directory = open_run_directory(config, fresh=False)
            if directory.finished is None and directory.resume_from is not None:
                check_same_data(directory.resume_from, self._job.data_digest)
        except FtrayError as error:
            self.refuse(config.name, str(error))
            return None
        checkpoint = directory.resume_from
        start = read_state(checkpoint).step if checkpoint is not None else 0
        has_come = until_step is not None and until_step <= start < num_steps(config, self._data.train)
        if directory.finished is not None or has_come:
            reporter = Reporter(config, metric=self._job.metric, tell=lambda report: self._tell(config.name, report))
            reporter.begin(directory.finished["steps"] if directory.finished is not None else 0)
            reporter.tell_all()
            outcome = "finished" if directory.finished is not None else "stopped"
            ray.get(self._job.desk.end.remote(config.name, outcome, None))
            return None
        (directory.path / STOP_REQUEST).unlink(missing_ok=True)
        losses = [r["loss"] for r in read_metrics(directory.path) if "loss" in r and r["step"] <= start]
        return Assignment(config, checkpoint, tuple(losses[-WINDOW_STEPS:]), until_step)

    def refuse(self, name: str, message: str) -> None:
        ray.get(self._job.desk.end.remote(name, "failed", message))

    def begin(self, member: Member) -> None:
        member.recorder = Recorder(member.config, member.directory, resume_step=member.step)
        reporter = Reporter(member.config, metric=self._job.metric, tell=lambda report: self._tell(member.name, report))
        reporter.begin(member.num_steps)
        self._reporters[member.name] = reporter
        self._began[member.name] = time.time()
        reporter.tell_all()

    def say(self, line: str) -> None:
        ray.get(self._job.desk.say.remote(line))

    def compare(self, sharing: RowSharing) -> None:
        """Tells, once it is known, whether sharing rows is faster."""
        if self._told_sharing or sharing.is_faster is None:
            return
        self._told_sharing = True
        shared, single = (max(sharing.rates[way]) for way in (True, False))
        way = "share rows" if sharing.is_faster else "have rows of their own"
        self.say(f"trials {way}: {shared:.0f} tokens/s shared, {single:.0f} each by itself")
        ray.get(self._job.desk.keep_sharing.remote(sharing.is_faster))

    def record(self, member: Member, told: MemberStep) -> None:
        examples = member.plan.examples(member.step - 1, end=member.end_position)
        lengths = self._data.train.sequence_lengths.reshape(len(self._data.train), -1)[examples]
        flops = self._flops.step(
            num_tokens=told.num_tokens,
            num_trained=told.num_trained_tokens,
            sum_squared_lengths=int((lengths**2).sum()),
            trains_base=False,
            reference=member.config.objective.type == "dpo",
        )
        record = StepRecord(
            step=member.step,
            loss=told.loss,
            learning_rate=told.learning_rate,
            grad_norm=told.grad_norm,
            num_tokens=told.num_tokens,
            num_trained_tokens=told.num_trained_tokens,
            tokens_per_s=told.num_tokens / told.seconds,
            seconds=told.seconds,
            time=time.time(),
            mfu=flops / told.seconds / self._rate,
            memory_gib=peak_memory_gib(),
            metrics=told.metrics,
        )
        self._append(member, record.as_dict())

    def evaluated(self, member: Member, loss: float) -> None:
        self._append(member, {"step": member.step, "eval_loss": loss, "time": time.time()})

    def stopping(self, members: list[Member]) -> list[str]:
        """By the study, or by the user."""
        return [m.name for m in members if m.name in self._asked or (m.directory / STOP_REQUEST).is_file()]

    def save(self, member: Member, *, must: bool) -> None:
        """One that fails, on a full disk, is told and left out, unless others go on from it."""
        try:
            save(member, self._base, data_digest=self._job.data_digest)
        except OSError as error:
            if must:
                raise
            with contextlib.suppress(OSError):
                record_event(member.directory, SAVE_FAILED, step=member.step, message=str(error))

    def end(self, member: Member, outcome: str, message: str | None) -> None:
        """The result is written beside the training of the others."""
        del self._reporters[member.name]
        self._finishing.append(self._writer.submit(self._finish, member, outcome, message))

    def raise_failures(self) -> None:
        """Of results that could not be written or told: nobody would hear of these members again."""
        done = [future for future in self._finishing if future.done()]
        self._finishing = [future for future in self._finishing if not future.done()]
        for future in done:
            future.result()

    def close(self) -> None:
        for future in self._finishing:
            future.result()
        self._writer.shutdown()

    def _finish(self, member: Member, outcome: str, message: str | None) -> None:
        assert member.recorder is not None
        member.recorder.close()
        if outcome == "finished":
            checkpoint: Path | None = newest_whole_checkpoint(member.directory)
            seconds = time.time() - self._began[member.name]
            finish(member.config, member.directory, checkpoint, self._base, self._data, seconds=seconds)
            drop_checkpoints(member.directory)
        ray.get(self._job.desk.end.remote(member.name, outcome, message))

    def _append(self, member: Member, record: dict[str, Any]) -> None:
        assert member.recorder is not None
        member.recorder.record(record)
        self._reporters[member.name].tell_news([record])

    def _tell(self, name: str, report: Report) -> None:
        if ray.get(self._job.desk.report.remote(name, report)) is not None:
            self._asked.add(name)
