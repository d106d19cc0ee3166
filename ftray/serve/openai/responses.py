"""How answers are laid out: OpenAI's chat and completion objects, whole and in chunks."""

import json
from collections import Counter
from collections.abc import Sequence

from ftray.serve.openai.calls import Arguments, Call, CallFinder, CallStart, Finder, ForcedCall, Part
from ftray.serve.protocol import EchoedPrompt, TokenLogprob, Tokens


class ChatResponses:
    """How a chat answer is laid out, whole and in chunks."""

    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, tools: Sequence[str] = (), *, is_forced: bool = False, max_calls: int | None = None):
        """`tools`: names of the functions that the model may call, or (`is_forced`) must. Of its calls `max_calls` are
        given."""
        self._tools = tools
        self._finder: type[CallFinder | ForcedCall] = ForcedCall if is_forced else CallFinder
        self._max_calls = max_calls
        self._finders: dict[int, Finder] = {}
        self._num_calls: Counter[int] = Counter()  # of each answer so far

    def choice(self, answer: Tokens) -> dict:
        parts = self._parts(answer)
        text = "".join(part for part in parts if isinstance(part, str))
        calls = [part.body() for part in whole_calls(parts)]
        message = {"role": "assistant", "content": text if text or not calls else None}
        if answer.thought:
            message["reasoning_content"] = answer.thought
        return self._around(answer, {"message": message | ({"tool_calls": calls} if calls else {})})

    def delta(self, answer: Tokens, *, first: bool) -> dict | None:
        """None where there is nothing to show yet."""
        begun = self._num_calls[answer.index]
        parts = self._parts(answer)
        if not (parts or answer.thought or answer.finish_reason or answer.logprobs or first):
            return None
        body: dict = {"role": "assistant"} if first else {}
        if answer.thought:
            body["reasoning_content"] = answer.thought
        calls = []
        for part in parts:
            if isinstance(part, Call | CallStart):
                calls.append({"index": begun, **part.body()})
                begun += 1
            elif isinstance(part, Arguments):
                calls.append({"index": begun - 1, "function": {"arguments": part.text}})
        text = "".join(part for part in parts if isinstance(part, str))
        if text or not (calls or answer.thought):
            body["content"] = text
        return self._around(answer, {"delta": body | ({"tool_calls": calls} if calls else {})})

    def _parts(self, answer: Tokens) -> list[Part]:
        if not self._tools:
            return [answer.text] if answer.text else []
        finder = self._finders.setdefault(answer.index, self._finder(self._tools))
        found = finder.push(answer.text)
        if answer.finish_reason:
            found = found + finder.finish(is_cut=answer.finish_reason == "length")
        parts: list[Part] = []
        for part in found:
            is_call = isinstance(part, Call | CallStart)
            if is_call and self._num_calls[answer.index] == self._max_calls:
                continue
            self._num_calls[answer.index] += is_call
            parts.append(part)
        return parts

    def _around(self, answer: Tokens, body: dict) -> dict:
        reported = [
            token_body(entry) | {"top_logprobs": [token_body(top) for top in entry.top]} for entry in answer.logprobs
        ]
        reason = answer.finish_reason
        if reason == "stop" and self._num_calls[answer.index]:
            reason = "tool_calls"
        return {
            "index": answer.index,
            **body,
            "logprobs": {"content": reported} if reported else None,
            "finish_reason": reason,
        }


class CompletionResponses:
    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"

    def __init__(self):
        self._offsets: Counter[int] = Counter()  # characters of each answer's tokens so far

    def choice(self, answer: Tokens) -> dict:
        prompt = answer.prompt or EchoedPrompt("")
        reported = prompt.logprobs + answer.logprobs
        return {
            "index": answer.index,
            "text": prompt.text + answer.text,
            "logprobs": self._logprobs(answer.index, reported) if reported else None,
            "finish_reason": answer.finish_reason,
        }

    def delta(self, answer: Tokens, *, first: bool) -> dict | None:
        shown = answer.text or answer.finish_reason or answer.logprobs or answer.prompt or first
        return self.choice(answer) if shown else None

    def _logprobs(self, index: int, reported: tuple[TokenLogprob, ...]) -> dict:
        offsets = []
        for entry in reported:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(entry.token)
        return {
            "tokens": [entry.token for entry in reported],
            "token_logprobs": [entry.logprob for entry in reported],
            "top_logprobs": [
                None if entry.logprob is None else {top.token: top.logprob for top in entry.top} for entry in reported
            ],
            "text_offset": offsets,
        }


def token_body(entry: TokenLogprob) -> dict:
    """`bytes`: also of a token that holds only part of a character."""
    text = entry.token.encode() if entry.raw is None else entry.raw
    return {"token": entry.token, "logprob": entry.logprob, "bytes": list(text)}


def whole_calls(parts: Sequence[Part]) -> list[Call]:
    calls: list[Call] = []
    for part in parts:
        if isinstance(part, CallStart):
            calls.append(Call(part.name, ""))
        elif isinstance(part, Arguments):
            calls[-1] = Call(calls[-1].name, calls[-1].arguments + part.text)
        elif isinstance(part, Call):
            calls.append(part)
    return calls


Responses = ChatResponses | CompletionResponses


def server_event(body: dict) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
