"""What tuning gained and what it broke, measured on the product of a run: exact match and the loss on general text."""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ftray.config.data import DataConfig
from ftray.config.run import RunConfig
from ftray.data.dataset import TokenizedDataset
from ftray.data.sets import evaluation_set
from ftray.data.tokens import tokenize_source
from ftray.errors import FtrayError, StoreError
from ftray.evaluate.task import Evaluation, load_questions
from ftray.model.adapters.directory import local_adapter
from ftray.model.chat import ChatRenderer
from ftray.objectives import objective_of, trained_turns
from ftray.tasks import Question

if TYPE_CHECKING:
    from ftray.infer.torch_engine.engine import TorchEngine


@dataclass(frozen=True)
class ScoreJob:
    """Products of runs over one base model."""

    base_model: str
    adapters: dict[str, Path | str | None]  # by name, a path or URL; None: the base model as it is
    run: RunConfig  # its held-out questions
    general_text: str | None
    held_out: bool = False  # also the loss on data.eval, which a run of a sweep has told already

    @property
    def needs(self) -> dict[str, float]:
        """Of Ray: a worker of the run scores what a worker of the run has trained."""
        return {"num_cpus": self.run.workers.cpus_each, "num_gpus": self.run.workers.gpus_each}


@dataclass(frozen=True)
class Score:
    accuracy: float | None  # exact match on data.eval; None: the objective asks no questions
    general_loss: float | None  # per token of `compare.general_text`
    problem: str | None = None  # why there are none: the engine cannot host such a product, say
    loss: float | None = None  # per trained token of data.eval


def tokenize_text(renderer: ChatRenderer, general_text: str, *, max_example_tokens: int) -> TokenizedDataset:
    """In pieces, every token of them scored. Raises `UserError`."""
    data = DataConfig(train=general_text, max_example_tokens=max_example_tokens, overlong="split")
    return tokenize_source("compare.general_text", general_text, data, renderer, shape="document")


def score_artifacts(job: ScoreJob, secrets: dict[str, str]) -> dict[str, Score]:
    """In a Ray task. The base is loaded once for all; a product that cannot be scored spoils no other's score."""
    os.environ.update(secrets)
    from ftray.infer.engines import make_local_engine
    from ftray.model.base import prepare_base
    from ftray.model.hardware import choose_hardware

    hardware = choose_hardware(use_gpu=job.run.workers.gpus_each > 0)
    base, tokens = prepare_base(job.base_model, chat=job.run.chat), job.run.data.max_example_tokens
    with contextlib.closing(make_local_engine(base, hardware, context_tokens=2 * tokens)) as engine:
        measures = measures_of(job, ChatRenderer(engine.tokenizer))
        return {name: score_artifact(engine, name, uri, measures) for name, uri in job.adapters.items()}


@dataclass(frozen=True)
class Measures:
    """What every product of a job is measured on."""

    questions: list[Question] | None  # None: the objective asks none
    general_text: TokenizedDataset | None
    held_out: TokenizedDataset | None
    max_example_tokens: int


def measures_of(job: ScoreJob, renderer: ChatRenderer) -> Measures:
    data, shape = job.run.data, objective_of(job.run.objective).shape
    text, held_out = None, None
    if job.general_text is not None:
        text = tokenize_text(renderer, job.general_text, max_example_tokens=data.max_example_tokens)
    if job.held_out:
        held_out = evaluation_set(data, renderer, shape=shape, turns=trained_turns(job.run.objective))
    asks = shape == "conversation" and data.eval is not None
    return Measures(load_questions(data) if asks else None, text, held_out, data.max_example_tokens)


def score_artifact(engine: "TorchEngine", name: str, uri: Path | str | None, measures: Measures) -> Score:
    """With the adapter loaded while it is measured. Raises `StoreError` where its store cannot be had."""
    from ftray.evaluate.offline import answer_questions, mean_loss
    from ftray.infer.engines import load_adapter

    key = name if uri is not None else None
    if uri is not None:
        try:
            load_adapter(engine, name, local_adapter(uri) or Path(uri))
        except StoreError:
            raise
        except FtrayError as error:
            return Score(None, None, problem=str(error))

    def loss_on(dataset: TokenizedDataset | None) -> float | None:
        if dataset is None:
            return None
        return mean_loss(engine, dataset, adapter=key, max_example_tokens=measures.max_example_tokens)

    accuracy = None
    if measures.questions is not None:
        answers = answer_questions(engine, measures.questions, adapter=key)
        accuracy = Evaluation(name, answers, loss=None).accuracy
    score = Score(accuracy, general_loss=loss_on(measures.general_text), loss=loss_on(measures.held_out))
    if key is not None:
        engine.unload_adapter(key)
    return score
