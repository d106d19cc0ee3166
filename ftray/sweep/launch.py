"""The driver of a sweep: its directory, the cluster's room, the trials, and the answer."""

import contextlib
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ftray.child_process import in_child_process
from ftray.cluster.probe import check_nodes
from ftray.cluster.resources import check_resources, fitting_groups, nodes_for
from ftray.cluster.session import ray_session
from ftray.cluster.signals import handled, stoppable
from ftray.cluster.weight_broadcast import broadcast_base
from ftray.config import RunConfig, Space, SweepConfig
from ftray.config.renamed import with_new_names
from ftray.config.run import WorkersConfig
from ftray.errors import NotFoundError, UserError
from ftray.evaluate.scores import tokenize_text
from ftray.model.base import BaseModel, load_tokenizer
from ftray.model.chat import ChatRenderer
from ftray.storage import read_json, write_json
from ftray.sweep.compare.comparison import is_measured
from ftray.sweep.compare.measure import measure_methods
from ftray.sweep.fused.coordinator import groups_of, run_fused
from ftray.sweep.fused.eligibility import Fusing, fusing_of
from ftray.sweep.on_tune.trials import TUNE_DIRECTORY, run_trials
from ftray.sweep.prepare import PreparedSweep, prepare_sweep
from ftray.sweep.report.report import REPORT, LivePage, write_sweep_report
from ftray.sweep.report.text import describe_plan, describe_state
from ftray.sweep.store import opened_sweep
from ftray.sweep.study import Study
from ftray.sweep.trials import trials_directory
from ftray.tracking.environment import describe_environment
from ftray.tracking.jobs import SWEEP
from ftray.tracking.runs import TOKENS, differences
from ftray.train.prepared_data import PreparedData, prepare_data_apart, rendering_as
from ftray.train.runs.claim import refuse_changes, refuse_unwritable
from ftray.train.runs.store import run_store, share_data

DATA = "data.json"
FUSED_SLOTS = 8
TPE_ROUNDS = 3  # of trials side by side at least: it learns from those that have ended
# What may change when a sweep goes on: how long and how wide it is searched, not what is searched.
MAY_CHANGE = (
    "sweep.search.trials",
    "sweep.search.budget",
    "sweep.search.max_concurrent",
    "sweep.search.fused",
    "sweep.publish",
)

Log = Callable[[str], None]


def run_sweep(config: SweepConfig, space: Space, *, log: Log, fresh: bool = False) -> Study:
    """Runs, or goes on with, the sweep. Raises `InterruptedRunError` on Ctrl-C, when the study's journal stands."""
    prepared = prepare_sweep(config, space)
    with opened_sweep(prepared.base_run, fresh=fresh) as directory:
        claim_directory(directory, prepared)
        study = Study(config, space, directory)
        if not study.is_over or (config.compare is not None and not is_measured(study, directory)):
            with ray_session(prepared.base_run):
                try:
                    search_in(directory, study, log=log)
                finally:
                    with uninterrupted():
                        study = look_into(directory)  # a fused sweep's coordinator has written on
                        refresh(study, directory)
        return study


def search_in(directory: Path, study: Study, *, log: Log) -> None:
    """A preempted machine or a scheduler's time limit ends a sweep as Ctrl-C does."""
    with stoppable() as asked:
        try:
            search(directory, study, log=log)
        except KeyboardInterrupt:
            state = describe_state(look_into(directory))
            raise asked.error(f"{study.config.name}: stopped; {state}") from None


def search(directory: Path, study: Study, *, log: Log) -> None:
    config, base_run = study.config, study.base_run
    fusing = fusing_of(config, study.space)
    date = read_json(directory / DATA).get("date") if (directory / DATA).is_file() else None
    base, data = prepare_data_apart(base_run, log, kept_in=run_store(study.trials_uri).local(TOKENS), date=date)
    check_data_of_sweep(directory, data, base)
    check_generations(study, data)
    check_resources(base_run.workers, log=log)
    check_nodes(run_store(study.trials_uri).shared_disk, base_run.workers)
    broadcast_base(base_run.base_model, nodes_for(base_run.workers), log=log)
    log(describe_plan(study))
    write_sweep_report(study, directory)
    log(f"as it goes: {study.uri}/{REPORT}")
    check_general_text(study, base, log=log)
    if fusing.example is not None and not study.is_over:
        if fusing.example.evaluation.samples:
            log("evaluation.samples: trials that train side by side answer none; `ftray train` of the best one does")
        run_groups(directory, study, fusing, *of_groups(fusing.example, study, base, data), log=log)
        study = Study(config, study.space, directory)  # the coordinator has written on
    if not study.is_over:
        share_data(run_store(study.trials_uri), data)  # before several do it at once
        run_apart(directory, study, reason=fusing.reason or "the rest", log=log)
    if config.compare is not None:
        measure_methods(study, directory, base, log=log)


def uninterrupted() -> contextlib.AbstractContextManager[None]:
    """A second Ctrl-C would cost the report, and the word of what goes on with the sweep."""
    return handled(signal.SIGINT, signal.SIG_IGN)


def check_generations(study: Study, data: PreparedData) -> None:
    """Raises `UserError`."""
    steps = data.num_steps
    if study.generation_steps is not None and study.generation_steps >= steps:
        raise UserError(
            f"search.scheduler pbt: a generation of {study.generation_steps} steps never ends in runs of {steps}; "
            "lower search.generation_steps, or evaluation.every where it is not given"
        )


def of_groups(example: RunConfig, study: Study, base: BaseModel, data: PreparedData) -> tuple[BaseModel, PreparedData]:
    """Base and data that groups share; they need not be those of the sweep's first run, which are given."""
    first = study.base_run
    if (example.base_model, example.chat, example.data) == (first.base_model, first.chat, first.data):
        return base, data
    kept_in = run_store(study.trials_uri).local(TOKENS)
    return prepare_data_apart(example, lambda text: None, kept_in=kept_in, date=base.chat.date)


def check_general_text(study: Study, base: BaseModel, *, log: Log) -> None:
    """As it will be scored at the end, hours from now. Raises `UserError`."""
    compare = study.config.compare
    if compare is not None and compare.general_text is not None:
        tokens = study.base_run.data.max_example_tokens
        in_child_process(check_text, base, compare.general_text, tokens, log=log)


def check_text(base: BaseModel, text: str, max_example_tokens: int, **_: object) -> None:
    tokenize_text(ChatRenderer(load_tokenizer(base)), text, max_example_tokens=max_example_tokens)


def check_data_of_sweep(directory: Path, data: PreparedData, base: BaseModel) -> None:
    """Trials on other data could not be compared with those that are done. Raises `UserError`."""
    digests = {"train": data.digest, "eval": data.eval.digest() if data.eval is not None else None}
    if base.chat.date is not None:
        digests["date"] = base.chat.date
    if (directory / DATA).is_file() and read_json(directory / DATA) != digests:
        raise UserError(
            f"{directory}: its data have changed since its first trials (rows, template or tokenizer); put the old "
            "files back, choose another name, or start over with --fresh"
        )
    write_json(directory / DATA, digests)


def run_groups(directory: Path, study: Study, fusing: Fusing, base: BaseModel, data: PreparedData, *, log: Log) -> None:
    """LoRA trials side by side over one base."""
    assert fusing.example is not None
    base_run, num_groups = groups_of(fusing.example)
    wanted, trials = study.config.search.fused, study.num_planned
    planned = None if trials is None else trials * len(study.config.seeds)
    limits = [limit for limit in (planned, study.config.search.max_concurrent) if limit is not None]
    if wanted == "auto" and study.config.search.algorithm == "tpe" and planned is not None:
        limits.append(-(-planned // TPE_ROUNDS))
    num_groups = min([num_groups, *limits])
    slots = FUSED_SLOTS if wanted == "auto" else int(wanted)
    in_all = min([slots * num_groups, *limits])
    train, evaluation = share_data(run_store(study.trials_uri), data)
    groups = f", in {num_groups} groups" if num_groups > 1 else ""
    log(f"fused: {in_all} at a time over one base, on {described(base_run.workers)}{groups}")
    job = {
        "base_run": rendering_as(base, base_run),
        "base_name": base.name_for_workers,
        "train_data": train,
        "eval_data": evaluation,
        "data_digest": data.digest,
        "adapters": fusing.adapters,
    }
    run_fused(
        study,
        directory,
        job,
        slots_of_groups=shares(in_all, num_groups),  # none takes what others could
        log=log,
        on_news=LivePage(lambda: refresh(look_into(directory), directory)),
    )


def shares(whole: int, count: int) -> list[int]:
    return [whole // count + (number < whole % count) for number in range(count)]


def run_apart(directory: Path, study: Study, *, reason: str, log: Log) -> None:
    """A process group for every trial."""
    workers, limit = study.base_run.workers, study.config.search.max_concurrent
    room = fitting_groups(workers)
    at_a_time = room if limit is None else min(room, limit)
    log(f"apart: {at_a_time} at a time, each on {described(workers)} ({reason})")
    page = LivePage(lambda: refresh(study, directory))
    run_trials(study, directory, max_concurrent=at_a_time, log=log, on_news=page)


def described(workers: WorkersConfig) -> str:
    each = f"{workers.gpus_each} GPU" if workers.gpus_each else f"{workers.cpus_each} CPU"
    plural = "s" if workers.count != 1 else ""
    return f"{workers.count} worker{plural} of {each}{'s' if max(workers.gpus_each, workers.cpus_each) > 1 else ''}"


def look_into(directory: Path) -> Study:
    """A sweep as its directory has it, for those who are not its driver. Raises `NotFoundError`."""
    if not (directory / SWEEP).is_file():
        near = sorted(path.parent.name for path in directory.parent.glob(f"*/{SWEEP}"))
        have = f"; {directory.parent} has {', '.join(near)}" if near else f"; {directory.parent} has none"
        raise NotFoundError(f"{directory.name}: no such sweep{have}")
    described = read_description(directory)
    config = SweepConfig.model_validate(described["sweep"])
    return Study(config, Space(described["run"], config.space), directory, is_driver=False)


def read_description(directory: Path) -> dict[str, Any]:
    """The sweep and the run's tree that it began with."""
    described = read_json(directory / SWEEP)
    return described | {"run": with_new_names(described["run"])}


def refresh(study: Study, directory: Path) -> None:
    """The page is not worth a sweep: on a full disk it stays as it was."""
    with contextlib.suppress(OSError):
        write_sweep_report(study, directory)


def claim_directory(directory: Path, prepared: PreparedSweep) -> None:
    """Makes or reopens it. Raises `UserError` when the name belongs to something else."""
    store = run_store(prepared.base_run.runs_dir)
    where = store.uri(prepared.config.name)
    if (directory / "config.json").is_file():
        raise UserError(f"name: {where} holds a run of this name; choose another (name=...)")
    refuse_unwritable(trials_directory(directory) / "scratch" if store.shared_disk is not None else directory)
    described = {"sweep": prepared.config.model_dump(mode="json"), "run": prepared.space.run}
    if (directory / SWEEP).is_file():
        changed = list(differences(read_description(directory), described))
        refused = [f"{key}: was {a}, is {b}" for key, a, b in changed if not key.startswith(MAY_CHANGE)]
        refuse_changes(where, refused, what="sweep", can_start_over=store.shared_disk is not None)
    write_json(directory / SWEEP, described)
    write_json(directory / "environment.json", describe_environment())
    shutil.rmtree(directory / TUNE_DIRECTORY, ignore_errors=True)  # the journal is what a sweep goes on from
