"""A model's thought, told apart from its answer while both are written."""

from collections.abc import Sequence
from typing import Any, Literal, Protocol

from ftray.infer.protocol import TokenEvent
from ftray.infer.text import TextStream, overlap
from ftray.model.chat.template import ThoughtFrame, leaves_thought_open

TOKENS_OF_MARK = 16  # at most, that open a thought at a prompt's end


class AnswerStream(Protocol):
    """Of one answer: what comes, told apart."""

    def push(self, token_id: int | None, text: str, *, is_last: bool) -> tuple[str, str]:
        """(thought, answer): what is certain now. `token_id`: None for the token that ends it; `text`: what the engine
        shows of it."""
        ...


class ThoughtStream:
    """Of one answer. What may be the beginning of a mark is held back."""

    def __init__(self, frame: ThoughtFrame, tokenizer: Any, prompt: str, *, keeps_raw: bool = False):
        """`prompt`: its end, at least as long as a mark. `keeps_raw`: `raw_answer` is wanted."""
        self._frame = frame
        self._keeps_raw = keeps_raw
        self._raw = TextStream(tokenizer, (), shows_control=True)
        self._state: Literal["head", "thought", "answer"] = "head"
        if not frame.opening:
            self._state = "thought" if leaves_thought_open(prompt) else "answer"
        self._held_raw = ""  # with control tokens
        self._held = ""  # as the engine shows it, in the head
        self._is_begun = {"thought": False, "answer": self._state == "answer"}  # white space before either is no part
        self.raw_answer = ""  # with control tokens: what the last push brought of the answer

    def push(self, token_id: int | None, text: str, *, is_last: bool) -> tuple[str, str]:
        """(thought, answer): what is certain now. `token_id`: None for the token that ends it; `text`: what the engine
        shows of it."""
        self.raw_answer = ""
        if self._state == "answer" and not self._keeps_raw:
            return "", self._begun("answer", text)
        if token_id is not None:
            self._held_raw += self._raw.push(token_id)
        if is_last:
            self._held_raw += self._raw.finish()
        if self._state == "answer":
            self.raw_answer, self._held_raw = self._held_raw, ""
            return "", self._begun("answer", text)
        if self._state == "head":
            self._held += text
            self._look_at_head(is_last=is_last)
        if self._state == "thought":
            return self._of_thought(is_last=is_last)
        if self._state == "answer":
            shown, self._held = self._held, ""
            self.raw_answer, self._held_raw = self._held_raw, ""
            return "", self._begun("answer", shown)
        return "", ""

    def _look_at_head(self, *, is_last: bool) -> None:
        head, frame = self._held_raw.lstrip(), self._frame
        if head.startswith(frame.opening):
            self._state, self._held_raw, self._held = "thought", head[len(frame.opening) :], ""
        elif frame.bare and head.startswith(frame.bare):
            self._state, self._held_raw, self._held = "answer", head[len(frame.bare) :], ""
        elif is_last or not (frame.opening.startswith(head) or frame.bare.startswith(head)):
            self._state, self._is_begun["answer"] = "answer", True

    def _of_thought(self, *, is_last: bool) -> tuple[str, str]:
        thought, found, rest = self._held_raw.partition(self._frame.closing)
        if found:
            self._state, self._held_raw, self.raw_answer = "answer", "", rest
            return self._begun("thought", thought.rstrip()), self._begun("answer", rest)
        held = 0 if is_last else overlap(thought, self._frame.closing)
        cut = len(thought[: len(thought) - held].rstrip())  # white space before the mark belongs to it
        self._held_raw = thought[cut:]
        return self._begun("thought", thought[:cut]), ""

    def _begun(self, part: str, text: str) -> str:
        if self._is_begun[part]:
            return text
        text = text.lstrip()
        self._is_begun[part] = bool(text)
        return text


def split(event: TokenEvent, stream: AnswerStream, stop_ids: set[int]) -> tuple[str, str]:
    """(thought, answer) of one more token."""
    token = None if event.token_id < 0 or event.token_id in stop_ids else event.token_id
    return stream.push(token, event.text, is_last=event.finish_reason is not None)


def thought_stream(
    frame: ThoughtFrame | None, tokenizer: Any, prompt: Sequence[int], *, keeps_raw: bool = False
) -> ThoughtStream | None:
    """Of an answer to these tokens; None where the template has no thoughts."""
    if frame is None:
        return None
    return ThoughtStream(frame, tokenizer, tokenizer.decode(prompt[-TOKENS_OF_MARK:]), keeps_raw=keeps_raw)
