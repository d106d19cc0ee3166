"""What tuning gained and what it broke, measured on the product of a run: exact match and the loss on general text."""

import os
from dataclasses import dataclass
from pathlib import Path

from ftray.config.data import DataConfig
from ftray.config.run import RunConfig
from ftray.data.dataset import TokenizedDataset
from ftray.data.tokens import tokenize_source
from ftray.errors import FtrayError, StoreError
from ftray.model.chat import ChatRenderer
from ftray.objectives import objective_of


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
    from ftray.evaluate.offline import answer_questions, mean_loss
    from ftray.evaluate.task import Evaluation, load_questions
    from ftray.infer.engines import load_adapter, make_local_engine
    from ftray.model.adapter import local_adapter
    from ftray.model.base import prepare_base
    from ftray.model.hardware import choose_hardware

    data, tokens = job.run.data, job.run.data.max_example_tokens
    asks = objective_of(job.run.objective).shape == "conversation" and data.eval is not None
    questions = load_questions(data) if asks else []
    hardware = choose_hardware(use_gpu=job.run.workers.gpus_each > 0)
    engine = make_local_engine(prepare_base(job.base_model), hardware, context_tokens=2 * tokens)
    renderer, text, held_out = ChatRenderer(engine.tokenizer), None, None
    if job.general_text is not None:
        text = tokenize_text(renderer, job.general_text, max_example_tokens=tokens)
    if job.held_out and data.eval is not None:
        shape = objective_of(job.run.objective).shape
        held_out = tokenize_source("data.eval", data.eval, data, renderer, shape=shape)
    scores = {}
    for name, uri in job.adapters.items():
        key = name if uri is not None else None
        try:
            if uri is not None:
                load_adapter(engine, name, local_adapter(uri) or Path(uri))
        except StoreError:
            raise
        except FtrayError as error:
            scores[name] = Score(None, None, problem=str(error))
            continue

        def loss_on(dataset: TokenizedDataset | None, key: str | None = key) -> float | None:
            return None if dataset is None else mean_loss(engine, dataset, adapter=key, max_example_tokens=tokens)

        answers = answer_questions(engine, questions, adapter=key) if asks else None
        scores[name] = Score(
            accuracy=Evaluation(name, answers, loss=None).accuracy if answers is not None else None,
            general_loss=loss_on(text),
            loss=loss_on(held_out),
        )
        if key is not None:
            engine.unload_adapter(key)
    engine.close()
    return scores
