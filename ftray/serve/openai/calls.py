"""Tool calls, found in what a model writes.

A call is `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` (Hermes, Qwen), or an answer that is nothing but
such an object or a list of them, with `arguments` or `parameters` (Llama 3, Mistral). An answer that must be a call is
shown as one while it is written. A call that is cut by the answer's length has what is there as its arguments.
"""

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ftray.infer.text import overlap
from ftray.model.chat.tool_prompt import CLOSING, OPENING

# Of a call, up to its arguments.
HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*')


@dataclass(frozen=True)
class Call:
    name: str
    arguments: str  # JSON

    def body(self) -> dict[str, Any]:
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


@dataclass(frozen=True)
class CallStart:
    """Of a call whose arguments come in pieces."""

    name: str

    def body(self) -> dict[str, Any]:
        return Call(self.name, "").body()


@dataclass(frozen=True)
class Arguments:
    """The next piece of the call that was started last."""

    text: str


Part = str | Call | CallStart | Arguments


class Finder(Protocol):
    def push(self, text: str) -> list[Part]: ...

    def finish(self, *, is_cut: bool) -> list[Part]:
        """What was held back. `is_cut`: the answer ended for its length."""
        ...


class CallFinder:
    """The calls in an answer that comes in pieces. Text that may be the beginning of a call is held back."""

    def __init__(self, names: Sequence[str]):
        self._names = frozenset(names)
        self._held = ""
        self._begun = False  # something other than white space has been seen
        self._is_object = False  # the answer begins like a bare call: known at its end

    def push(self, text: str) -> list[Part]:
        self._held += text
        if not self._begun and self._held.strip():
            self._begun = True
            self._is_object = self._held.lstrip()[0] in "{["
        if not self._begun or self._is_object:
            return []
        parts: list[Part] = []
        while (start := self._held.find(OPENING)) >= 0:
            end = self._held.find(CLOSING, start)
            if end < 0:
                break
            block = self._held[start + len(OPENING) : end]
            whole = self._held[start : end + len(CLOSING)]
            parts += [self._held[:start].rstrip(), *(calls_in(block, self._names) or [whole])]
            self._held = self._held[end + len(CLOSING) :].lstrip()
        cut = start if start >= 0 else len(self._held) - overlap(self._held, OPENING)
        cut = len(self._held[:cut].rstrip())  # white space around a call belongs to it
        parts.append(self._held[:cut])
        self._held = self._held[cut:]
        return [part for part in parts if part != ""]

    def finish(self, *, is_cut: bool) -> list[Part]:
        rest, self._held = self._held, ""
        if self._is_object and (calls := calls_in(rest, self._names)):
            return list(calls)
        call = rest.removeprefix(OPENING)
        if rest != call and (calls := calls_in(call, self._names)):  # its closing mark was cut
            return list(calls)
        begun = HEAD.match(call)
        if is_cut and begun is not None and (name := json.loads(begun[1])) in self._names:
            return [Call(name, call[begun.end() :])]
        return [rest] if rest else []


class ForcedCall:
    """An answer that is one call and nothing else: its name first, then its arguments as they come."""

    def __init__(self, names: Sequence[str]):
        self._names = names
        self._text = ""  # all of it
        self._shown = 0  # up to here
        self._is_begun = False

    def push(self, text: str) -> list[Part]:
        self._text += text
        parts: list[Part] = []
        if not self._is_begun:
            head = HEAD.match(self._text)
            if head is None:
                return []
            self._is_begun, self._shown = True, head.end()
            parts.append(CallStart(json.loads(head[1])))
        end = len(self._text.rstrip())
        return parts + self._up_to(end - 1 if self._text[:end].endswith("}") else end)  # it may be the call's own

    def finish(self, *, is_cut: bool) -> list[Part]:
        if not self._is_begun:
            written = self._text.partition(":")[2].strip().strip('"')
            possible = [name for name in self._names if name.startswith(written)]
            if is_cut and len(possible) == 1:
                return [CallStart(possible[0])]
            return [self._text] if self._text else []
        try:
            json.loads(self._text)
        except ValueError:  # cut: the last brace closes something within the arguments
            return self._up_to(len(self._text))
        return []

    def _up_to(self, end: int) -> list[Part]:
        piece, self._shown = self._text[self._shown : end], max(self._shown, end)
        return [Arguments(piece)] if piece else []


def calls_in(text: str, names: frozenset[str]) -> list[Call] | None:
    """None where it is something else."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    calls = [call_of(entry, names) for entry in (found if isinstance(found, list) else [found])]
    return None if None in calls or not calls else [call for call in calls if call is not None]


def call_of(entry: Any, names: frozenset[str]) -> Call | None:
    if not isinstance(entry, Mapping) or entry.get("name") not in names:
        return None
    arguments = entry.get("arguments", entry.get("parameters", {}))
    if not isinstance(arguments, Mapping):
        return None
    return Call(entry["name"], json.dumps(arguments, ensure_ascii=False))
