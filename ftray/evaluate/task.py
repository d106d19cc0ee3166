"""Held-out questions, and what their answers came to."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ftray.config.data import DataConfig
from ftray.data.formats import Conversation
from ftray.data.sets import read_evaluation
from ftray.errors import DataError
from ftray.model.chat import ChatRenderer
from ftray.tasks import EXACT_MATCH, Question, Task

# An answer longer than every expected one is wrong already; a few tokens more show how it goes on.
SPARE_TOKENS = 4


@dataclass(frozen=True)
class Answer:
    question: str
    expected: str
    answer: str
    scores: dict[str, float]

    @property
    def correct(self) -> bool:
        """By every score."""
        return all(value >= 1 for value in self.scores.values())


@dataclass(frozen=True)
class Evaluation:
    model: str
    answers: list[Answer]
    loss: float | None  # per answer token; the endpoint does not give it
    task: Task = EXACT_MATCH

    @property
    def scores(self) -> dict[str, float]:
        """Means over the answers."""
        names = self.answers[0].scores
        return {name: sum(answer.scores[name] for answer in self.answers) / len(self.answers) for name in names}

    @property
    def accuracy(self) -> float:
        """The task's deciding score: exact match, where nothing else is asked for."""
        return self.scores[self.task.score]

    @property
    def losing(self) -> list[Answer]:
        return [answer for answer in self.answers if not answer.correct]

    def summary(self) -> dict:
        return {
            "model": self.model,
            "accuracy": self.accuracy,
            "scores": self.scores,
            "loss": self.loss,
            "num_examples": len(self.answers),
            "losing": [vars(answer) for answer in self.losing],
        }


def judged(task: Task, question: Question, answer: str) -> Answer:
    return Answer(question.text, question.expected, answer, task.judge(question, answer))


def load_questions(data: DataConfig) -> list[Question]:
    rows = read_evaluation(data, shape="conversation")
    questions = []
    for key, number, talk in rows:
        try:
            questions.append(make_question(talk, f"{key}: row {number}"))
        except DataError:
            if data.bad_rows == "error":
                raise
    return questions


def make_question(talk: Conversation, label: str) -> Question:
    messages = talk.messages
    last = next((i for i in reversed(range(len(messages))) if messages[i]["role"] == "assistant"), None)
    if last is None:
        raise DataError(f"{label}: no assistant turn to compare an answer with")
    if last != len(messages) - 1 and any(message["role"] == "user" for message in messages[last:]):
        raise DataError(f"{label}: ends with a question that has no answer; remove it, or answer it")
    if messages[last].get("tool_calls"):
        raise DataError(f"{label}: its last answer is a tool call, which no task judges yet")
    expected = messages[last]
    return Question(messages[:last], expected["content"], talk.tools, expected.get("reasoning_content"))


def with_thoughts_apart(questions: Sequence[Question], renderer: ChatRenderer) -> list[Question]:
    """A thought within an expected answer is judged no more than one that the model writes."""
    split = [(question, *renderer.template.split_inline(question.expected)) for question in questions]
    return [q if thought is None else replace(q, expected=expected, thought=thought) for q, thought, expected in split]


def answer_tokens(questions: Sequence[Question], renderer: ChatRenderer) -> int:
    """`max_tokens` for the answers."""
    return max(num_answer_tokens(question, renderer) for question in questions) + SPARE_TOKENS


def num_answer_tokens(question: Question, renderer: ChatRenderer) -> int:
    """Of the expected answer, with what the template writes around it."""
    thought = {} if question.thought is None else {"reasoning_content": question.thought}
    answered = [*question.messages, {"role": "assistant", "content": question.expected, **thought}]
    last = len(question.messages)
    rendered = renderer.training_examples(answered, question.tools, is_trained=lambda turn: turn == last)
    return int(rendered[-1].trained.sum())
