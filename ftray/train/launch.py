"""The driver's side of a run: check, tokenise while Ray starts, train, and leave a complete run directory."""

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray

from ftray.cluster.probe import check_nodes
from ftray.cluster.resources import check_resources, nodes_for
from ftray.cluster.session import start_ray
from ftray.cluster.signals import on_sigterm
from ftray.cluster.weight_broadcast import broadcast_base
from ftray.config import RunConfig
from ftray.data.dataset import TokenizedDataset
from ftray.data.tokens import tokenize_source
from ftray.errors import InterruptedRunError, TerminatedRunError
from ftray.model.base import BaseModel, check_length, load_tokenizer, prepare_base
from ftray.model.chat import ChatRenderer
from ftray.objectives import objective_of
from ftray.tracking.events import record_driver_event
from ftray.tracking.runs import RESULT
from ftray.train.checkpoints.checkpoint import data_digest, read_state
from ftray.train.checkpoints.disk_space import check_disk
from ftray.train.hooks.own_callbacks import Callback, calling, own_callbacks
from ftray.train.job import STOP_REQUEST, TOKENS, request_stop
from ftray.train.on_ray.trainer import Watcher, train_on_ray
from ftray.train.prepare import prepare
from ftray.train.runs.directory import RunDirectory, check_same_data, only_driver, open_run_directory
from ftray.train.runs.finalize import PreparedData, describe_interruption, finalize_run, is_complete


def launch(
    config: RunConfig,
    watcher: Watcher,
    *,
    fresh: bool = False,
    init_from: Path | str | None = None,
    profile_steps: int = 0,
    until_step: int | None = None,
    callbacks: Sequence[Callback] = (),
) -> dict[str, Any]:
    """Runs, or goes on with, `config.name` and returns what its result.json says.

    `init_from`: path or URL of the PEFT directory that `adapter.init_from` names. `profile_steps`: of rank 0, traced.
    `until_step`: it saves there and raises `InterruptedRunError`; the same call with a later one goes on. `callbacks`:
    beside those that the config names.
    """
    began = time.time()
    prepare(config, fresh=fresh)
    with only_driver(config) as stored:
        directory = open_run_directory(config, fresh=fresh, stored=stored)
        parts = {"init_from": init_from, "profile_steps": profile_steps, "until_step": until_step}
        stop = functools.partial(request_stop, directory.path)
        with calling([*own_callbacks(config), *callbacks], stop=stop) as on_metrics:
            return run_in(directory, config, watcher.calling_also(on_metrics), began=began, **parts)


def run_in(
    directory: RunDirectory,
    config: RunConfig,
    watcher: Watcher,
    *,
    began: float,
    **parts: Any,
) -> dict[str, Any]:
    if directory.finished is not None:
        watcher.log(
            f"{config.name} is finished already; its result stands ({directory.uri_of(directory.path / RESULT)})"
        )
        return directory.finished
    for change in directory.changes:
        watcher.log(f"goes on with a changed setting: {change}")
    own_session = not ray.is_initialized()
    (directory.path / STOP_REQUEST).unlink(missing_ok=True)
    try:
        with ThreadPoolExecutor(max_workers=1) as pool, set_on_failure() as cancelled:
            kept_in = directory.path.parent / TOKENS
            preparing = pool.submit(prepare_data, config, watcher.log, kept_in=kept_in, cancelled=cancelled)
            if own_session:
                start_ray(run=config.name)
            check_resources(config.workers, log=watcher.log)
            check_nodes(directory.path if directory.stored is None else None, config.workers)
            base, data = preparing.result()
            broadcast_base(config.base_model, nodes_for(config.workers), log=watcher.log)
        done = directory.resume_from is not None and is_complete(directory.resume_from, config, data)
        if directory.stored is None and not done:
            check_disk(config, base, directory.path)
        if directory.resume_from is not None:
            check_same_data(directory.resume_from, data.digest)
            watcher.log(f"resumes from {directory.uri_of(directory.resume_from)}")
        with stop_on_sigterm(directory.path) as terminated:
            train_on_ray(config, directory, base, data, watcher, **parts)
        checkpoint = directory.newest_checkpoint()
        if not is_complete(checkpoint, config, data):
            by = "SIGTERM" if terminated.is_set() else "ftray runs stop"
            assert checkpoint is not None
            if read_state(checkpoint).step != parts["until_step"]:
                record_driver_event(directory.path, "stopped", by=by)
            stopped = TerminatedRunError if terminated.is_set() else InterruptedRunError
            raise stopped(describe_interruption(config, directory))
    except KeyboardInterrupt:
        own_session = False  # a thread still waits for Ray, which would end the process before its message is printed
        raise InterruptedRunError(describe_interruption(config, directory)) from None
    finally:
        if own_session:
            ray.shutdown()
    return finalize_run(config, directory, checkpoint, base, data, seconds=time.time() - began)


@contextlib.contextmanager
def set_on_failure() -> Iterator[threading.Event]:
    event = threading.Event()
    try:
        yield event
    except BaseException:
        event.set()
        raise


def stop_on_sigterm(run_directory: Path) -> contextlib.AbstractContextManager[threading.Event]:
    """SIGTERM (a preempted machine, a scheduler's time limit) asks the workers to save and end at the next step."""
    return on_sigterm(lambda: request_stop(run_directory))


def prepare_data(
    config: RunConfig,
    log: Callable[[str], None],
    *,
    kept_in: Path | None = None,
    cancelled: threading.Event | None = None,
) -> tuple[BaseModel, PreparedData]:
    """`kept_in`: where tokens are kept, for the workers and for the next run on the same data; None: nowhere."""
    base = prepare_base(config.base_model, log=log)
    check_length(base, config.data.max_example_tokens, key="data.max_example_tokens")
    renderer = ChatRenderer(load_tokenizer(base))

    def tokens(key: str, source: str) -> TokenizedDataset:
        shape = objective_of(config.objective).shape
        return tokenize_source(key, source, config.data, renderer, shape=shape, kept_in=kept_in, cancelled=cancelled)

    train = tokens("data.train", config.data.train)
    evaluation = tokens("data.eval", config.data.eval) if config.data.eval is not None else None
    log(f"base model: {base}")
    log(f"training data: {describe_counts(train)}")
    if evaluation is not None:
        log(f"evaluation data: {describe_counts(evaluation)}")
    return base, PreparedData(train, evaluation, data_digest(train))


def describe_counts(dataset: TokenizedDataset) -> str:
    counts = dataset.counts()
    lost = "".join(f", {counts[key]} {key}" for key in ("truncated", "dropped") if counts[key])
    return (
        f"{counts['examples']:,} examples{lost}, {counts['tokens']:,} tokens, {counts['trained_tokens']:,} trained, "
        f"longest {counts['longest']:,}"
    )
