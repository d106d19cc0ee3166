"""What the model under training answers: greedy continuations of a few evaluation prompts, at each evaluation.

There is no cache: a token costs a forward pass over all prompts, through the training engine, so that every ZeRO stage,
adapter and sharding is served by the same few lines. The prompts are few and the answers short.
"""

from dataclasses import dataclass

import numpy as np

from ftray.data.dataset import TokenizedDataset
from ftray.data.pack import continuation_row
from ftray.model.base import BaseModel, context_limit, load_tokenizer
from ftray.model.chat import ChatRenderer
from ftray.tracking.samples import write_samples
from ftray.train.engine.protocol import TrainingEngine, all_ranks
from ftray.train.job import TrainJob

DOCUMENT_PROMPT = 16  # tokens, where all of an example is trained


@dataclass(frozen=True)
class Prompt:
    ids: list[int]
    expected: list[int]


def take_prompts(dataset: TokenizedDataset, count: int, *, max_tokens: int = 1 << 30) -> list[Prompt]:
    """Of the first examples, as evaluation asks them: what comes before the last assistant turn, cut to its last
    `max_tokens`, and that turn. Of a document, whose every token is trained: its beginning, and the rest."""
    prompts = []
    for index in range(min(count, len(dataset))):
        ids, trained = next(iter(dataset.sequences(index)))
        end = int(np.flatnonzero(trained)[-1]) + 1
        start = int(np.flatnonzero(~trained[:end])[-1]) + 1 if not trained[:end].all() else DOCUMENT_PROMPT
        prompts.append(Prompt(ids[max(0, start - max_tokens) : start].tolist(), ids[start:end].tolist()))
    return prompts


def sample_answers(
    engine: TrainingEngine, prompts: list[Prompt], *, max_tokens: int, stop_ids: frozenset[int]
) -> list[list[int]]:
    """Token ids of each answer, without the one that ended it.

    All ranks call it: each answers its share of the prompts, and all make the same number of forward passes.
    """
    own = list(range(len(prompts)))[engine.share :: engine.num_shares]
    sequences = [list(prompts[i].ids) for i in own]
    finished = [False] * len(own)
    for _ in range(max_tokens):
        if all_ranks(engine, all(finished)):
            break
        row = continuation_row(sequences) if sequences else continuation_row([[0]])
        for place, token in enumerate(engine.next_tokens(row)[: len(sequences)]):
            finished[place] = finished[place] or token in stop_ids
            if not finished[place]:
                sequences[place].append(token)
    answers = {i: sequence[len(prompts[i].ids) :] for i, sequence in zip(own, sequences, strict=True)}
    everyone = {i: answer for part in engine.gather(answers) for i, answer in part.items()}
    return [everyone[i] for i in range(len(prompts))]


class Sampler:
    """Answers a few evaluation prompts and appends them to samples.jsonl."""

    def __init__(
        self, job: TrainJob, engine: TrainingEngine, base: BaseModel, dataset: TokenizedDataset | None, *, rank: int
    ):
        evaluation = job.config.evaluation
        self._engine = engine
        self._run_directory = job.run_directory
        self._rank = rank
        self._max_tokens = evaluation.sample_tokens
        self._prompts: list[Prompt] = []
        if dataset is not None and evaluation.samples:
            together = -(-evaluation.samples // engine.num_shares)  # in one row, which stays within a micro-batch
            room = job.config.batch.tokens_per_micro_batch // together - self._max_tokens
            longest = min(room, (context_limit(base) or room) - self._max_tokens)
            self._prompts = take_prompts(dataset, evaluation.samples, max_tokens=max(1, longest))
        if self._prompts:
            self._renderer = ChatRenderer(load_tokenizer(base))

    def sample(self, step: int) -> None:
        if not self._prompts:
            return
        stop_ids = frozenset(self._renderer.stop_ids)
        answers = sample_answers(self._engine, self._prompts, max_tokens=self._max_tokens, stop_ids=stop_ids)
        if self._rank == 0:
            rows = [
                {"prompt": self._text(p.ids, whole=True), "answer": self._text(a), "expected": self._text(p.expected)}
                for p, a in zip(self._prompts, answers, strict=True)
            ]
            write_samples(self._run_directory, step, rows)

    def _text(self, ids: list[int], *, whole: bool = False) -> str:
        return self._renderer.tokenizer.decode(ids, skip_special_tokens=not whole).strip()
