"""The whole way on a laptop: measure the base, fine-tune, publish, serve, ask both, report. Stages in order."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from ftray.artifacts.publish import publish_once
from ftray.cluster.session import start_ray
from ftray.config import RunConfig, ServeConfig, load_config
from ftray.errors import UserError
from ftray.evaluate.endpoint import evaluate_endpoint
from ftray.evaluate.offline import evaluate_offline
from ftray.evaluate.task import Evaluation, answer_tokens, load_questions
from ftray.infer.engines import load_adapter
from ftray.infer.torch_engine.engine import TorchEngine
from ftray.model.base import prepare_base
from ftray.model.chat import ChatRenderer
from ftray.model.hardware import choose_hardware
from ftray.registry import AdapterVersion, Registry
from ftray.serve.app import start_endpoint, stop_endpoint
from ftray.serve.http.ports import check_port
from ftray.tracking.report import AnswerTable, write_report
from ftray.train.launch import launch
from ftray.train.on_ray.trainer import Watcher
from ftray.train.prepare import prepare

RUN_FILE = "configs/quickstart/run.yaml"
SERVE_FILE = "configs/quickstart/serve.yaml"


@dataclass(frozen=True)
class Outcome:
    run_directory: Path
    adapter: AdapterVersion
    base: Evaluation
    tuned: Evaluation
    served_base: Evaluation
    served: Evaluation
    report: Path
    port: int
    seconds: dict[str, float]

    def summary(self) -> dict[str, Any]:
        return {
            "base_accuracy": self.base.accuracy,
            "tuned_accuracy": self.tuned.accuracy,
            "served_accuracy": self.served.accuracy,
            "adapter": str(self.adapter),
            "run_dir": str(self.run_directory),
            "seconds": {name: round(value, 1) for name, value in self.seconds.items()},
        }


class Stopwatch:
    def __init__(self, announce: Callable[[str], None]):
        self.seconds: dict[str, float] = {}
        self._announce = announce

    @contextmanager
    def stage(self, name: str, title: str) -> Iterator[None]:
        self._announce(title)
        began = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - began


def load_quickstart(overrides: list[str], *, port: int | None) -> tuple[RunConfig, ServeConfig]:
    if not Path(RUN_FILE).is_file():
        raise UserError(f"{RUN_FILE}: not here ({Path.cwd()}); run `ftray quickstart` at the root of a clone of ftray")
    run = load_config(RUN_FILE, overrides, kind="run")
    settings = [f"adapters.registry={run.registry}", f"base_model={run.base_model}", "adapters.preload=[]"]
    settings += [f"port={port}"] if port is not None else []
    return run, load_config(SERVE_FILE, settings, kind="serve")


def run_quickstart(run: RunConfig, serve: ServeConfig, watcher: Watcher, announce: Callable[[str], None]) -> Outcome:
    check_port(serve.host, serve.port)
    watch = Stopwatch(announce)
    try:
        with watch.stage("prepare", f"Preparing {run.base_model}"):
            base = prepare_base(run.base_model, chat=run.chat, log=watcher.log)
            questions = load_questions(run.data)
            hardware = choose_hardware(use_gpu=serve.replicas.gpus_each > 0)  # as the endpoint will
            engine = TorchEngine(base, hardware, serve.engine, serve.adapters)
            watcher.log(f"runs on {engine.hardware}")
        with watch.stage("measure_base", f"Measuring the untuned model on {len(questions)} held-out questions"):
            before = evaluate_offline(engine, questions, run.data, adapter=None, model=run.base_model)
            watcher.log(f"exact match {before.accuracy:.1%}, loss {before.loss:.3f}")
        with watch.stage("train", f"Fine-tuning {run.name} with {run.workers.count} workers"):
            start_ray(join=False)
            launch(prepare(run), watcher)
            run_directory = (Path(run.runs_dir) / run.name).absolute()
        with watch.stage("publish", "Publishing the adapter"):
            adapter = publish_once(Registry(run.registry), run.name, run_directory / "adapter", alias="prod")
            watcher.log(f"{adapter} in {run.registry}, and {run.name}@prod points at it")
        with watch.stage("measure_tuned", "Measuring the tuned model"):
            load_adapter(engine, str(adapter), run_directory / "adapter")
            after = evaluate_offline(engine, questions, run.data, adapter=str(adapter), model=str(adapter))
            watcher.log(f"exact match {after.accuracy:.1%}, loss {after.loss:.3f}")
            max_tokens = answer_tokens(questions, ChatRenderer(engine.tokenizer))
            del engine
        with watch.stage("serve", f"Serving base and adapter on {serve.host}:{serve.port} and asking both"):
            url = start_endpoint(serve)
            served_base = evaluate_endpoint(url, questions, model=serve.base_model, max_tokens=max_tokens)
            served = evaluate_endpoint(url, questions, model=f"{run.name}@prod", max_tokens=max_tokens)
            watcher.log(f"exact match as served: base {served_base.accuracy:.1%}, tuned {served.accuracy:.1%}")
            stop_endpoint()
    finally:
        ray.shutdown()
    table = AnswerTable(
        before.accuracy, after.accuracy, served.accuracy, str(adapter), answer_rows(served_base, served)
    )
    report = write_report(run_directory, answers=table)
    watch.seconds["total"] = sum(watch.seconds.values())
    return Outcome(run_directory, adapter, before, after, served_base, served, report, serve.port, watch.seconds)


def answer_rows(base: Evaluation, tuned: Evaluation) -> list[dict[str, Any]]:
    return [
        {"question": b.question, "expected": b.expected, "base": b.answer, "tuned": t.answer}
        for b, t in zip(base.answers, tuned.answers, strict=True)
    ]
