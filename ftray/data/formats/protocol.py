"""What a format is: how a row of a source becomes a conversation, a document or a pair."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ftray.model.chat import Message
from ftray.objectives import Shape


@dataclass(frozen=True)
class Conversation:
    """Messages, the tools that are offered in it, and the numbers of assistant turns that its row says are not trained
    (`untrained`), or are (`chosen`)."""

    messages: list[Message]
    tools: list[dict[str, Any]] = field(default_factory=list)
    untrained: frozenset[int] = frozenset()
    chosen: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Pair:
    """Two answers to one conversation, the preferred one first."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]


Read = Callable[[dict[str, Any]], Any]  # a row to a `Conversation`, a text or a `Pair`; raises `DataError` for it
Transform = Callable[[dict[str, Any]], dict[str, Any] | None]  # before it is read; None: the row is dropped


@dataclass(frozen=True)
class Format:
    """A user's own: `data.format: "module:NAME"`. `read` gives list[Message] or a `Conversation` for the shape
    conversation, a str for document, a `Pair` for pair."""

    shape: Shape
    read: Read
