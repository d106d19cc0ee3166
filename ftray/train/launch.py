"""The driver's side of a run: check, tokenise while Ray starts, train, and leave a complete run directory."""

import contextlib
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from ftray.config import RunConfig
from ftray.data.dataset import TokenizedDataset
from ftray.data.sources import check_source
from ftray.data.tokens import tokenize_source
from ftray.errors import FtrayError, InterruptedRunError, TerminatedRunError, UserError
from ftray.model.base import BaseModel, check_base_name, check_length, load_tokenizer, prepare_base
from ftray.model.chat import ChatRenderer
from ftray.storage import read_json
from ftray.tracking.events import record_event
from ftray.tracking.metrics import MetricsFollower
from ftray.train.checkpoint import CHECKPOINTS, data_digest, newest_whole_checkpoint, read_state
from ftray.train.finish import PreparedData, describe_interruption, finish, is_complete, num_steps, ray_logs
from ftray.train.job import HARDWARE, STOP_REQUEST, WORKER_ERROR, TrainJob, request_stop, run_in_worker
from ftray.train.preflight import check_nodes, check_resources
from ftray.train.run_directory import RESULT, RunDirectory, check_same_data, open_run_directory
from ftray.train.watchdog import clear_hangs, read_hang

POLL_S = 0.2
RETRY_S = 10.0
ERROR_GRACE_S = 20.0
TOKENS = ".tokens"  # beside the run directories: all nodes share it
# Passed from the driver's environment to the workers.
WORKER_ENVIRONMENT = (
    "HF_HOME",
    "HF_ENDPOINT",
    "NCCL_SOCKET_IFNAME",
    "NCCL_DEBUG",
    "WANDB_API_KEY",
    "WANDB_BASE_URL",
    "HF_TOKEN",
    "HF_HUB_OFFLINE",
    "GLOO_SOCKET_IFNAME",
    "XDG_CACHE_HOME",
)


@dataclass(frozen=True)
class Watcher:
    """How a run is shown; the CLI draws, tests collect."""

    say: Callable[[str], None]
    on_metrics: Callable[[list[dict[str, Any]]], None]
    on_start: Callable[[int, int], None]  # (first step, number of steps)


def check_before_anything(config: RunConfig) -> None:
    """What is wrong with the input as far as a file listing can tell, in well under a second."""
    check_base_name(config.base_model)
    check_source("data.train", config.data.train)
    if config.data.eval is not None:
        check_source("data.eval", config.data.eval)


def launch(
    config: RunConfig, watcher: Watcher, *, fresh: bool = False, init_from: Path | None = None
) -> dict[str, Any]:
    """Runs, or goes on with, `config.name` and returns what its result.json says.

    `init_from`: the PEFT directory that `adapter.init_from` names.
    """
    began = time.time()
    check_before_anything(config)
    directory = open_run_directory(config, fresh=fresh)
    if directory.finished is not None:
        watcher.say(f"{config.name} is finished already; its result stands ({directory.path / RESULT})")
        return directory.finished
    for change in directory.changes:
        watcher.say(f"goes on with a changed setting: {change}")
    own_session = not ray.is_initialized()
    (directory.path / STOP_REQUEST).unlink(missing_ok=True)
    try:
        with ThreadPoolExecutor(max_workers=1) as pool:
            preparing = pool.submit(prepare_data, config, watcher.say, kept_in=directory.path.parent / TOKENS)
            if own_session:
                start_ray()
            check_resources(config.workers, say=watcher.say)
            check_nodes(directory.path, config.workers)
            base, data = preparing.result()
        if directory.resume_from is not None:
            check_same_data(directory.resume_from, data.digest)
            watcher.say(f"resumes from {directory.resume_from}")
        with stop_on_sigterm(directory.path) as terminated:
            train_on_ray(config, directory, base, data, watcher, init_from=init_from)
        checkpoint = newest_whole_checkpoint(directory.path)
        if not is_complete(checkpoint, config, data):
            record_event(directory.path, "stopped", by="SIGTERM" if terminated.is_set() else "ftray runs stop")
            stopped = TerminatedRunError if terminated.is_set() else InterruptedRunError
            raise stopped(describe_interruption(config, directory.path))
    except KeyboardInterrupt:
        raise InterruptedRunError(describe_interruption(config, directory.path)) from None
    finally:
        if own_session:
            ray.shutdown()
    return finish(config, directory.path, checkpoint, base, data, seconds=time.time() - began)


@contextlib.contextmanager
def stop_on_sigterm(run_directory: Path) -> Iterator[threading.Event]:
    """SIGTERM (a preempted machine, a scheduler's time limit) asks the workers to save and end at the next step."""
    terminated = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield terminated
        return

    def ask(*_: Any) -> None:
        terminated.set()
        request_stop(run_directory)

    earlier = signal.signal(signal.SIGTERM, ask)  # after ray.init, which sets one that ends the process at once
    try:
        yield terminated
    finally:
        signal.signal(signal.SIGTERM, earlier)


def start_ray(*, join: bool = True) -> bool:
    """Joins the cluster of RAY_ADDRESS (True; `ray job submit` sets it), else starts a session of our own (False).

    A session that another program runs on this machine is left alone: it would end under us when that program does.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")  # a worker without GPUs sees none
    address = os.environ.get("RAY_ADDRESS") if join else None
    try:
        ray.init(address=address or "local", logging_level=logging.ERROR, log_to_driver=False)
    except ConnectionError as error:
        raise UserError(f"RAY_ADDRESS: {address}: no Ray cluster answers there ({error}); unset or mend it") from None
    return address is not None


def prepare_data(
    config: RunConfig, say: Callable[[str], None], *, kept_in: Path | None = None
) -> tuple[BaseModel, PreparedData]:
    """`kept_in`: where tokens are kept, for the workers and for the next run on the same data; None: nowhere."""
    base = prepare_base(config.base_model, say=say)
    check_length(base, config.data.max_example_tokens, key="data.max_example_tokens")
    renderer = ChatRenderer(load_tokenizer(base))

    def tokens(key: str, source: str) -> TokenizedDataset:
        objective = config.objective.type
        return tokenize_source(key, source, config.data, renderer, objective=objective, kept_in=kept_in)

    train = tokens("data.train", config.data.train)
    evaluation = tokens("data.eval", config.data.eval) if config.data.eval is not None else None
    say(f"base model: {base}")
    say(f"training data: {describe_counts(train)}")
    if evaluation is not None:
        say(f"evaluation data: {describe_counts(evaluation)}")
    return base, PreparedData(train, evaluation, data_digest(train))


def describe_counts(dataset: TokenizedDataset) -> str:
    counts = dataset.counts()
    lost = "".join(f", {counts[key]} {key}" for key in ("truncated", "dropped") if counts[key])
    return (
        f"{counts['examples']:,} examples{lost}, {counts['tokens']:,} tokens, {counts['trained_tokens']:,} trained, "
        f"longest {counts['longest']:,}"
    )


def train_on_ray(
    config: RunConfig,
    directory: RunDirectory,
    base: BaseModel,
    data: PreparedData,
    watcher: Watcher,
    *,
    init_from: Path | None,
) -> None:
    """Ray Train replaces workers that fail; when its own controller fails (a full disk under its notes), it is started
    again here, and the workers go on from the last checkpoint."""
    from ray.train import ControllerError

    (directory.path / WORKER_ERROR).unlink(missing_ok=True)
    assert data.train.directory is not None, "the launch keeps its tokens"
    job = TrainJob(
        config=config,
        run_directory=directory.path,
        base_name=str(base.directory) if Path(config.base_model).exists() else config.base_model,
        init_from=init_from,
        data_digest=data.digest,
        train_data=data.train.directory,
        eval_data=data.eval.directory if data.eval is not None else None,
    )
    start = read_state(directory.resume_from).step if directory.resume_from is not None else 0
    watcher.on_start(start, num_steps(config, data.train))
    for tries_left in reversed(range(config.workers.max_failures + 1)):
        clear_ray_notes(directory.path / CHECKPOINTS)
        failure = fit_and_follow(make_trainer(job), directory.path, watcher, world_size=config.workers.count)
        if failure is None:
            return
        if tries_left == 0 or not isinstance(failure, ControllerError):
            message = f"training failed: {last_line(failure)}; the workers' logs are in {ray_logs()}"
            raise FtrayError(message) from failure
        watcher.say(f"Ray Train stopped ({last_line(failure)}); tries again in {RETRY_S:.0f} s")
        time.sleep(RETRY_S)
        with contextlib.suppress(OSError):
            record_event(directory.path, "controller_failed", message=last_line(failure))


def make_trainer(job: TrainJob) -> Any:
    from ray.train import CheckpointConfig, FailureConfig, ScalingConfig
    from ray.train import RunConfig as RayRunConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    workers, guard = job.config.workers, job.config.guard
    skips = guard.max_skips if guard.on_bad_loss == "skip" else 0  # each is a restart
    bundle = {"CPU": float(workers.cpus_each)} | ({"GPU": float(workers.gpus_each)} if workers.gpus_each else {})
    return TorchTrainer(
        run_in_worker,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="nccl" if workers.gpus_each else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers.count, use_gpu=workers.gpus_each > 0, resources_per_worker=bundle
        ),
        run_config=RayRunConfig(
            name=CHECKPOINTS,  # so that a checkpoint lies at runs/NAME/checkpoints/step-N
            storage_path=str(job.run_directory),
            failure_config=FailureConfig(max_failures=workers.max_failures + skips),
            checkpoint_config=CheckpointConfig(num_to_keep=job.config.checkpoint.keep),
            worker_runtime_env={"env_vars": worker_environment(workers.gpus_each)},
        ),
    )


def clear_ray_notes(checkpoints: Path) -> None:
    """What an earlier part of the run left there and Ray would stumble over."""
    shutil.rmtree(checkpoints / ".validate_storage_marker", ignore_errors=True)
    notes = checkpoints / "checkpoint_manager_snapshot.json"
    try:
        if notes.is_file():
            read_json(notes)
    except ValueError:  # cut short; which checkpoints there are, their manifests say
        notes.unlink()


def worker_environment(gpus_each: int) -> dict[str, str]:
    passed = {name: os.environ[name] for name in WORKER_ENVIRONMENT if name in os.environ}
    # Relative paths stay the driver's; Ray would move each worker into the checkpoint folder.
    fixed = {"RAY_CHDIR_TO_TRIAL_DIR": "0", "TOKENIZERS_PARALLELISM": "false"}
    if gpus_each == 0:
        fixed["DS_ACCELERATOR"] = "cpu"
    return fixed | passed


def fit_and_follow(trainer: Any, run_directory: Path, watcher: Watcher, *, world_size: int) -> BaseException | None:
    """Returns Ray's failure, if there is one; raises what the workers themselves said.

    `fit` runs in a thread (in the main one it would take over Ctrl-C); here the metrics are followed meanwhile.
    """
    outcome: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except Exception as error:  # noqa: BLE001  carried over to the main thread
            outcome.append(error)

    (run_directory / HARDWARE).unlink(missing_ok=True)
    clear_hangs(run_directory)
    told_hardware = False
    follower = MetricsFollower(run_directory)
    follower.poll()  # what an earlier part wrote
    thread = threading.Thread(target=fit, name="ray-train-fit", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(POLL_S)
        if not told_hardware and (run_directory / HARDWARE).is_file():
            told_hardware = True
            watcher.say(f"workers run on {read_json(run_directory / HARDWARE)['hardware']}")
        watcher.on_metrics(follower.poll())
        if (run_directory / WORKER_ERROR).is_file():
            thread.join(ERROR_GRACE_S)  # other workers may wait for the one that has given up
            break
        if hang := read_hang(run_directory, world_size=world_size):
            clear_hangs(run_directory)
            record_event(run_directory, "hang", message=hang)
            watcher.say(f"{hang}; the workers start again from the last checkpoint")
    watcher.on_metrics(follower.poll())
    if (run_directory / WORKER_ERROR).is_file():
        failure = read_json(run_directory / WORKER_ERROR)
        raise (UserError if failure["exit_code"] == 2 else FtrayError)(failure["message"])
    return outcome[0] if outcome else None


def last_line(error: BaseException) -> str:
    failures = getattr(error, "worker_failures", None)
    if failures:
        rank, cause = next(iter(failures.items()))
        return f"worker {rank}: {(str(cause).strip().splitlines() or [type(cause).__name__])[-1]}"
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
