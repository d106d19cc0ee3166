"""Held-out questions and how answers to them are judged."""

from collections.abc import Sequence
from dataclasses import dataclass

from ftray.config.run import DataConfig
from ftray.data.rows import row_reader
from ftray.data.sources import load_rows
from ftray.errors import DataError
from ftray.model.chat import ChatRenderer, Message

# An answer longer than every expected one is wrong already; a few tokens more show how it goes on.
SPARE_TOKENS = 4


@dataclass(frozen=True)
class Question:
    """A conversation up to its last assistant turn, and that turn."""

    messages: list[Message]
    expected: str

    @property
    def text(self) -> str:
        return next((m["content"] for m in reversed(self.messages) if m["role"] == "user"), "")


@dataclass(frozen=True)
class Answer:
    question: str
    expected: str
    answer: str

    @property
    def correct(self) -> bool:
        return self.answer.strip() == self.expected.strip()


@dataclass(frozen=True)
class Evaluation:
    model: str
    answers: list[Answer]
    loss: float | None  # per answer token; the endpoint does not give it

    @property
    def accuracy(self) -> float:
        return sum(answer.correct for answer in self.answers) / len(self.answers)

    @property
    def losing(self) -> list[Answer]:
        return [answer for answer in self.answers if not answer.correct]

    def summary(self) -> dict:
        return {
            "model": self.model,
            "accuracy": self.accuracy,
            "loss": self.loss,
            "num_examples": len(self.answers),
            "losing": [vars(answer) for answer in self.losing],
        }


def load_questions(data: DataConfig) -> list[Question]:
    if data.eval is None:
        raise DataError("data.eval: not given; an evaluation needs held-out rows")
    rows = load_rows("data.eval", data.eval, revision=data.revision)
    read = row_reader(data.columns, rows.column_names, key=f"data.eval: {data.eval}")
    return [make_question(read(row), number) for number, row in enumerate(rows, start=1)]


def make_question(messages: list[Message], number: int) -> Question:
    last = next((i for i in reversed(range(len(messages))) if messages[i]["role"] == "assistant"), None)
    if last is None:
        raise DataError(f"data.eval: row {number}: no assistant turn to compare an answer with")
    return Question(messages[:last], messages[last]["content"])


def answer_tokens(questions: Sequence[Question], renderer: ChatRenderer) -> int:
    """`max_tokens` for the answers."""
    longest = max(len(renderer.tokenizer(q.expected, add_special_tokens=False)["input_ids"]) for q in questions)
    return longest + SPARE_TOKENS
