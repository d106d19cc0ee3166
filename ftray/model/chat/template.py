"""What a chat template can do, found by rendering probes: a template is a program of others, and its words tell little.

Templates differ in whether they take a system turn, tools, calls (their arguments as an object or as text), thoughts
(and under which key), content as a text or in parts; and in what closes an assistant's turn.
"""

import copy
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ftray.errors import DataError
from ftray.model.chat.control_tokens import ControlTokens
from ftray.model.chat.messages import THOUGHT_KEYS, Message
from ftray.model.chat.tool_prompt import tools_in_text

OPENED, CLOSED = "<think>", "</think>"
INLINE = re.compile(r"\s*<think>(.*?)</think>\s*(.*)", re.DOTALL)
# Words of letters and digits alone, which every template passes through.
ASKED, ANSWERED, THOUGHT, CALLED = "zq7asked", "zq7answered", "zq7thought", "zq7called"
USER = {"role": "user", "content": ASKED}
PROBE_TOOL = {
    "type": "function",
    "function": {"name": CALLED, "description": "d", "parameters": {"type": "object", "properties": {}}},
}


class Template:
    """The chat template of a tokenizer. Messages are those of `messages.py`."""

    def __init__(self, tokenizer: Any, control: ControlTokens):
        self._tokenizer = tokenizer
        self._control = control
        self.source = tokenizer.chat_template

    # -- rendering -------------------------------------------------------------------------------------------------

    def readable(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]],
        *,
        drops_thoughts: bool = False,
        tells_calls_as_text: bool = False,
    ) -> tuple[list[Message], Any]:
        """(messages, tools) as this template reads them; control tokens in them are hidden. Thoughts that it has no
        place for are refused (`DataError`), or, of answers that were given long ago, left out."""
        named = [self._with_thought(index, m, drops=drops_thoughts) for index, m in enumerate(messages)]
        keeps_thought = self.thought_key is None and not self.opens_thought  # it stands in the text, as it is
        hidden = self._control.hide_in_messages(with_names_of_results(named), keeps_thought=keeps_thought)
        tools = self._control.hide(list(tools))
        has_calls = any(message.get("tool_calls") for message in hidden)
        takes_them = self.takes_tools if tools else self.takes_calls or not has_calls
        if takes_them and not tells_calls_as_text and not self.takes_several_calls:
            check_one_call(messages)
        if not takes_them or tells_calls_as_text:
            hidden, tools = tools_in_text(hidden, tools, takes_system=self.takes_system), ()
        if self.wants_text_arguments:
            hidden = [with_text_arguments(message) for message in hidden]
        return [as_parts(message) for message in hidden] if self.wants_parts else hidden, tools

    def render(self, messages: Sequence[Message], *, ask: bool, tools: Sequence[dict[str, Any]] = ()) -> str:
        """Raises `DataError` for whatever the template raises."""
        given = {"tools": list(tools)} if tools else {}
        try:
            return self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=ask, **given
            )
        except Exception as error:  # noqa: BLE001  a template is a program of others: what it raises, it refuses
            raise DataError(f"the chat template refuses this conversation: {error}") from None

    def split_inline(self, content: str) -> tuple[str | None, str]:
        """(thought, the rest) of an answer's text that begins with a thought, where the template has thoughts."""
        has_thoughts = self.thought_key is not None or self.opens_thought
        found = INLINE.fullmatch(content) if has_thoughts else None
        return (None, content) if found is None else (found[1].strip("\n"), found[2])

    def _with_thought(self, index: int, message: Message, *, drops: bool) -> Message:
        """A thought under the key that the template reads; also one that stands at the head of the answer's text, since
        the template would write an empty one beside it."""
        thought = message.get("reasoning_content")
        if thought is None:
            thought, content = self.split_inline(message["content"]) if message["role"] == "assistant" else (None, "")
            if thought is None:
                return message
            message = {**message, "content": content}
        rest = {key: value for key, value in message.items() if key != "reasoning_content"}
        if self.thought_key is None and not self.opens_thought:
            if drops:
                return rest
            raise DataError(
                f"message {index}: the chat template has no place for reasoning_content; write it into the content as "
                f"{OPENED}...{CLOSED}, or remove it"
            )
        return rest | {self.thought_key or "reasoning_content": thought}

    # -- what it can do --------------------------------------------------------------------------------------------

    def _finds(self, word: str, messages: Sequence[Message], **how: Any) -> bool:
        try:
            return word in self.render(messages, ask=False, **how)
        except DataError:
            return False

    @cached_property
    def wants_parts(self) -> bool:
        """Plain text as content renders as nothing."""
        return not self._finds(ASKED, [USER]) and self._finds(ASKED, [as_parts(USER)])

    @cached_property
    def takes_system(self) -> bool:
        return self._finds(THOUGHT, [self._shaped("system", THOUGHT), self._user])

    @cached_property
    def _user(self) -> Message:
        return self._shaped("user", ASKED)

    @cached_property
    def _answer(self) -> Message:
        return self._shaped("assistant", ANSWERED)

    def _shaped(self, role: str, content: str, **more: Any) -> Message:
        message = {"role": role, "content": content, **more}
        return as_parts(message) if self.wants_parts else message

    def _call(self, arguments: Any) -> Message:
        function = {"name": CALLED, "arguments": arguments}
        return self._shaped("assistant", "", tool_calls=[{"id": "call00001", "type": "function", "function": function}])

    @cached_property
    def wants_text_arguments(self) -> bool:
        object_fails = not self._finds(CALLED, [self._user, self._call({"a": "b"})])
        return object_fails and self._finds(CALLED, [self._user, self._call('{"a": "b"}')])

    @cached_property
    def takes_tools(self) -> bool:
        """Tools, and calls of them, are rendered; one that knows the word and renders no call gets both as text."""
        offered, called = (
            self._rendered(messages, tools=[PROBE_TOOL]).count(CALLED)
            for messages in ([self._user], [self._user, self._probe_call])
        )
        return 0 < offered < called

    @cached_property
    def takes_calls(self) -> bool:
        """Where no tools are given."""
        return self._finds(CALLED, [self._user, self._probe_call])

    @cached_property
    def _probe_call(self) -> Message:
        return self._call('{"a": "b"}' if self.wants_text_arguments else {"a": "b"})

    @cached_property
    def takes_several_calls(self) -> bool:
        """In one turn."""
        function = {"name": ASKED, "arguments": self._probe_call["tool_calls"][0]["function"]["arguments"]}
        other = {"id": "call00002", "type": "function", "function": function}
        turn = {**self._probe_call, "tool_calls": [*self._probe_call["tool_calls"], other]}
        shown = self._rendered([self._shaped("user", ANSWERED), turn], tools=[PROBE_TOOL])
        return ASKED in shown and CALLED in shown.partition(ANSWERED)[2]

    @cached_property
    def rendered_call(self) -> str:
        """A call as its turn has it; empty where there is no place for one."""
        if not self.takes_tools:
            return ""
        prompt, whole = self._rendered([self._user], ask=True, tools=[PROBE_TOOL]), self._called
        common = next((at for at, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
        return whole[common:]

    @cached_property
    def _called(self) -> str:
        return self._rendered([self._user, self._probe_call], tools=[PROBE_TOOL])

    @cached_property
    def thought_key(self) -> str | None:
        """Under which the last turn's thought is read."""
        turns = {key: self._shaped("assistant", ANSWERED, **{key: THOUGHT}) for key in THOUGHT_KEYS}
        return next((key for key, turn in turns.items() if self._finds(THOUGHT, [self._user, turn])), None)

    @cached_property
    def opens_thought(self) -> bool:
        """The prompt ends in a thought that is begun."""
        return leaves_thought_open(self._rendered([self._user], ask=True))

    def _rendered(self, messages: Sequence[Message], *, ask: bool = False, tools: Sequence[Any] = ()) -> str:
        try:
            return self.render(messages, ask=ask, tools=tools)
        except DataError:
            return ""

    @cached_property
    def ending(self) -> str:
        """Control tokens that close an answer, as the template writes them behind its text; empty: none."""
        text = self._rendered([self._user, self._answer])
        found = re.match(rf"\s*(?:{self._control.pattern})+", text.rpartition(ANSWERED)[2])
        return found[0] if found is not None and ANSWERED in text else ""

    @cached_property
    def ending_by_next(self) -> dict[str, str]:
        """Where nothing closes a turn: the control token by which the next one begins, by that one's role. GLM's models
        are trained to write it."""
        if self.ending:
            return {}
        return {role: token for role in ("user", "tool") if (token := self._beginning_of(role)) is not None}

    def _beginning_of(self, role: str) -> str | None:
        answer = self._probe_call if role == "tool" else self._answer
        following = self._shaped(role, ASKED, **({"tool_call_id": "call00001"} if role == "tool" else {}))
        whole, longer = self._rendered([self._user, answer]), self._rendered([self._user, answer, following])
        found = re.match(self._control.pattern, longer[len(whole) :]) if whole and longer.startswith(whole) else None
        return found[0] if found is not None else None

    @property
    def ends_answers(self) -> bool:
        return bool(self.ending or self.ending_by_next)

    @property
    def stop_tokens(self) -> set[str]:
        """At which an answer ends."""
        endings = [self.ending, *self.ending_by_next.values()]
        if self.ending and self.takes_tools:
            behind = self._called.rpartition(CALLED)[2]
            endings.append(behind[: self.end_of(behind)])
        found = [re.findall(self._control.pattern, text) for text in endings]
        return {tokens[-1] for tokens in found if tokens}

    @cached_property
    def thought_frame(self) -> "ThoughtFrame | None":
        """None where the template has no place for thoughts."""
        prompt = self._rendered([self._user], ask=True)
        if self.thought_key is None:
            return ThoughtFrame("", CLOSED, "") if self.opens_thought else None
        turn = self._shaped("assistant", ANSWERED, **{self.thought_key: THOUGHT})
        with_thought, without = (self._rendered([self._user, answer]) for answer in (turn, self._answer))
        if not with_thought.startswith(prompt):
            return None
        opening, _, rest = with_thought[len(prompt) :].partition(THOUGHT)
        bare = without[len(prompt) :].partition(ANSWERED)[0] if without.startswith(prompt) else ""
        return ThoughtFrame(opening.strip(), rest.partition(ANSWERED)[0].strip(), bare.strip())

    def end_of(self, turn: str) -> int:
        """Where, in the text of an assistant's turn, its end token ends: what stands behind it is never generated."""
        if self.ending and (at := turn.rfind(self.ending)) >= 0:
            return at + len(self.ending)
        found = re.search(rf"(?:{self._control.pattern})+(?=\s*\Z)", turn)
        return found.end() if found is not None else len(turn)


@dataclass(frozen=True)
class ThoughtFrame:
    """What a template writes around a thought and before its answer, white space at the ends aside."""

    opening: str  # empty: the prompt opens it
    closing: str
    bare: str  # before an answer without a thought

    def split(self, answer: str) -> tuple[str, str]:
        """(thought, the answer by itself). One that was cut within its thought has no answer."""
        text = answer.lstrip()
        if text.startswith(self.opening):
            thought, found, rest = text[len(self.opening) :].partition(self.closing)
            if found or not self.bare or not text.startswith(self.bare):
                return thought.strip(), rest.lstrip()
        return "", text.removeprefix(self.bare).lstrip() if self.bare and text.startswith(self.bare) else answer


def leaves_thought_open(prompt: str) -> bool:
    return prompt.rfind(OPENED) > prompt.rfind(CLOSED) and prompt.rstrip().endswith(OPENED)


def check_one_call(messages: Sequence[Message]) -> None:
    """Raises `DataError` for a turn of several: the template has words for the first alone."""
    for index, message in enumerate(messages):
        if len(message.get("tool_calls", [])) > 1:
            raise DataError(
                f"message {index}: the chat template has a place for one tool call in a turn; write a turn for each, "
                "with its result behind it"
            )


def as_parts(message: Message) -> Message:
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def with_names_of_results(messages: Sequence[Message]) -> list[Message]:
    """A tool's result has the name of the call that it answers: some templates need it."""
    names: dict[str | None, str] = {}
    named = []
    for message in messages:
        for call in message.get("tool_calls", []):
            names[call.get("id")] = names[None] = call["function"]["name"]
        if message["role"] == "tool" and "name" not in message and names:
            message = {**message, "name": names.get(message.get("tool_call_id"), names[None])}
        named.append(message)
    return named


def with_text_arguments(message: Message) -> Message:
    """Of its calls."""
    if not message.get("tool_calls"):
        return message
    calls = copy.deepcopy(message["tool_calls"])
    for call in calls:
        if not isinstance(call["function"]["arguments"], str):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return {**message, "tool_calls": calls}
