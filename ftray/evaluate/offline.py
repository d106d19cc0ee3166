"""Through the engine in this process: greedy answers for exact match, and the loss of the expected answers."""

from collections.abc import Sequence

from ftray.config.data import DataConfig
from ftray.data.dataset import TokenizedDataset
from ftray.data.examples import examples_of
from ftray.data.micro_batches import first_fit
from ftray.data.pack import pack
from ftray.data.sets import evaluation_set
from ftray.data.tokens import ALL_TURNS
from ftray.evaluate.task import Answer, Evaluation, answer_tokens, judged, with_thoughts_apart
from ftray.infer.engines import generate
from ftray.infer.protocol import Request, SamplingParams
from ftray.infer.torch_engine.engine import TorchEngine
from ftray.model.chat import ChatRenderer
from ftray.objectives import TrainedTurns
from ftray.tasks import EXACT_MATCH, Question, Task

SCORE_TOKENS = 2048  # of one packed row


def evaluate_offline(
    engine: TorchEngine,
    questions: Sequence[Question],
    data: DataConfig,
    *,
    adapter: str | None,
    model: str,
    task: Task = EXACT_MATCH,
    turns: TrainedTurns = ALL_TURNS,
) -> Evaluation:
    """`adapter`: the key it is loaded under in the engine, or None for the base model. `turns`: that the loss is of."""
    answers = answer_questions(engine, questions, adapter=adapter, task=task)
    dataset = evaluation_set(data, ChatRenderer(engine.tokenizer), turns=turns)
    assert dataset is not None
    # Mean negative log-likelihood per answer token: what training reports as eval_loss.
    loss = mean_loss(engine, dataset, adapter=adapter, max_example_tokens=data.max_example_tokens)
    return Evaluation(model, answers, loss, task)


def answer_questions(
    engine: TorchEngine, questions: Sequence[Question], *, adapter: str | None, task: Task = EXACT_MATCH
) -> list[Answer]:
    renderer = ChatRenderer(engine.tokenizer)
    questions = with_thoughts_apart(questions, renderer)
    sampling = SamplingParams(temperature=0, max_tokens=answer_tokens(questions, renderer))
    requests = [
        Request(str(i), renderer.prompt_ids(question.messages, question.tools), sampling, adapter)
        for i, question in enumerate(questions)
    ]
    texts = generate(engine, requests, frame=renderer.template.thought_frame)
    return [judged(task, question, texts[str(i)]) for i, question in enumerate(questions)]


def mean_loss(engine: TorchEngine, dataset: TokenizedDataset, *, adapter: str | None, max_example_tokens: int) -> float:
    """Mean negative log-likelihood per trained token of the dataset."""
    budget = max(SCORE_TOKENS, max_example_tokens)
    total, count = 0.0, 0
    for examples in first_fit(examples_of(dataset), budget):
        log_probs = engine.score(pack(examples), adapter)
        total -= log_probs.double().sum().item()
        count += len(log_probs)
    return total / count
