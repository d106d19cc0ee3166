"""Tool calls, told apart from a model's words while both are written, in whatever format its chat template has. They
are passed on as `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, the one form that the HTTP layer reads.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from ftray.infer.call_formats import INVOKED, CallFormat, Calls, Schemas, format_of, has_messages, typed_values
from ftray.infer.text import TextStream, overlap
from ftray.infer.thoughts import AnswerStream, ThoughtStream, thought_stream
from ftray.model.chat.template import Template, ThoughtFrame
from ftray.model.chat.tool_prompt import CLOSING, OPENING

NO_THOUGHTS = ThoughtFrame("", "</think>", "")
HEADER_END = "<|message|>"
MESSAGE_ENDS = ("<|end|>", "<|eom|>", "<|eot|>", "<|call|>", "<|return|>", "<|start|>")
MUSES_END = "</atem:function_calls>"
RECIPIENT = re.compile(r"\bto=(?:functions\.)?([\w.-]+)")
THOUGHTS = re.compile(r"<\|channel\|>analysis|\bto=self\b")


class CallStream:
    """Of one answer. What may be the beginning of a call's mark is held back."""

    def __init__(self, form: CallFormat, schemas: Schemas, thoughts: ThoughtStream):
        self._form = form
        self._schemas = schemas
        self._thoughts = thoughts
        self._raw = ""  # with control tokens
        self._shown = ""  # as the engine shows it
        self._is_call = False

    def push(self, token_id: int | None, text: str, *, is_last: bool) -> tuple[str, str]:
        thought, shown = self._thoughts.push(token_id, text, is_last=is_last)
        self._shown += shown
        self._raw += self._thoughts.raw_answer
        return thought, self._released(is_last=is_last)

    def _released(self, *, is_last: bool) -> str:
        released = ""
        while True:
            if not self._is_call:
                words, self._is_call = self._words(is_last=is_last)
                released += words
                if not self._is_call:
                    return released
            call, self._is_call = self._call(is_last=is_last)
            released += call
            if self._is_call or (is_last and not self._raw):
                return released

    def _words(self, *, is_last: bool) -> tuple[str, bool]:
        """(what stands before the next call and is certain, whether one opens)."""
        opening = self._form.opening
        _, found, rest = self._raw.partition(opening)
        if found:
            words = self._shown.partition(opening)[0]  # all of it, where the mark is a control token: that is not shown
            self._raw, self._shown = rest, ""
            return words, True
        held = 0 if is_last else overlap(self._raw, opening)
        if not held or not self._shown.endswith(self._raw[-held:]):
            held = 0
        cut = len(self._shown) - held
        words, self._shown = self._shown[:cut], self._shown[cut:]
        self._raw = self._shown
        return words, False

    def _call(self, *, is_last: bool) -> tuple[str, bool]:
        """(the call, whether it goes on)."""
        end = self._form.closing or self._form.opening
        block, found, rest = self._raw.partition(end)
        if not found and not is_last:
            return "", True
        self._raw = self._shown = rest
        calls = self._form.read(block, self._schemas)
        opens_next = bool(found) and not self._form.closing
        return written(
            calls
        ) if calls else f"{self._form.opening}{block}{found if self._form.closing else ''}", opens_next


class MessageStream:
    """Of a turn that is several messages (https://github.com/openai/harmony): thoughts, words, calls, each behind a
    header that ends in `<|message|>`."""

    def __init__(self, tokenizer: Any, schemas: Schemas):
        self._text = TextStream(tokenizer, (), shows_control=True)
        self._schemas = schemas
        self._raw = ""
        self._header: str | None = None  # of the message that is being written; None: it is not whole yet

    def push(self, token_id: int | None, text: str, *, is_last: bool) -> tuple[str, str]:
        if token_id is not None:
            self._raw += self._text.push(token_id)
        if is_last:
            self._raw += self._text.finish()
        thought, answer = "", ""
        while True:
            if self._header is None:
                header, found, rest = self._raw.partition(HEADER_END)
                if not found:
                    return thought, answer
                self._header, self._raw = header, rest
            content, is_whole = self._content(is_last=is_last)
            if THOUGHTS.search(self._header):
                thought += content
            elif recipient := self._recipient():
                answer += self._call(recipient, content, is_cut=not is_whole) if is_whole or is_last else ""
                self._raw = self._raw if is_whole or is_last else content
            else:
                answer += content
            if not is_whole:
                return thought, answer
            self._header = None

    def _recipient(self) -> str | None:
        """The function that is called."""
        found = RECIPIENT.search(self._header or "")
        return found[1] if found is not None and found[1] != "user" else None

    def _content(self, *, is_last: bool) -> tuple[str, bool]:
        """(what is certain of it, whether that is all)."""
        ends = [(at, mark) for mark in MESSAGE_ENDS if (at := self._raw.find(mark)) >= 0]
        if ends:
            at, mark = min(ends)
            content, self._raw = self._raw[:at], self._raw[at + len(mark) :]
            return content, True
        content, self._raw = self._raw, ""
        return content, is_last and self._recipient() is not None and is_complete(content)

    def _call(self, name: str, content: str, *, is_cut: bool) -> str:
        if content.lstrip().startswith("<"):
            named = typed_values(INVOKED.findall(content), self._schemas.get(name))
            return content if is_cut else written([(name, named)])
        arguments = content.strip() or "{}"
        whole = f'{OPENING}{{"name": {json.dumps(name)}, "arguments": {arguments}'
        return whole if is_cut else f"{whole}}}{CLOSING}"


def is_complete(arguments: str) -> bool:
    """Of a call whose message has no end: the token that ends an answer is not shown."""
    try:
        json.loads(arguments.strip() or "{}")
    except ValueError:
        return arguments.rstrip().endswith(MUSES_END)
    return True


def written(calls: Calls) -> str:
    return "\n".join(
        f"{OPENING}{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}{CLOSING}"
        for name, arguments in calls
    )


def answer_stream(
    template: Template, tokenizer: Any, prompt: Sequence[int], *, tools: Sequence[dict[str, Any]] = ()
) -> AnswerStream | None:
    """Of an answer to these tokens, which may call `tools`; None where it is its text and nothing else."""
    form = format_of(template) if tools else None
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
    if tools and has_messages(template):
        return MessageStream(tokenizer, schemas)
    if form is None:
        return thought_stream(template.thought_frame, tokenizer, prompt)
    thoughts = thought_stream(template.thought_frame or NO_THOUGHTS, tokenizer, prompt, keeps_raw=True)
    assert thoughts is not None
    return CallStream(form, schemas, thoughts)
