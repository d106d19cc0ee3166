"""What a task is: how an answer to a question is judged. Evaluation asks; a task only judges."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Question:
    """A conversation up to its last assistant turn, and that turn."""

    messages: list[dict[str, Any]]
    expected: str
    tools: list[dict[str, Any]] = field(default_factory=list)
    thought: str | None = None  # of the expected turn, which is not judged

    @property
    def text(self) -> str:
        return next((m["content"] for m in reversed(self.messages) if m["role"] == "user"), "")


@dataclass(frozen=True)
class Task:
    """`judge`: (question, answer) to scores by name, 1 for as good as can be; an evaluation's are their means."""

    judge: Callable[[Question, str], dict[str, float]]
    score: str  # the name of the one that decides
