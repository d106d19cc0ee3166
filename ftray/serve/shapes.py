"""How answers are laid out: OpenAI's chat and completion objects, whole and in chunks."""

import json
from collections import Counter

from ftray.serve.job import Event


class ChatShape:
    """How a chat answer is laid out, whole and in chunks."""

    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, index: int, answer: Event) -> dict:
        message = {"role": "assistant", "content": answer["text"]}
        return self._around(index, answer, {"message": message})

    def delta(self, index: int, answer: Event, *, first: bool) -> dict:
        role = {"role": "assistant"} if first else {}
        return self._around(index, answer, {"delta": role | {"content": answer["text"]}})

    def _around(self, index: int, answer: Event, body: dict) -> dict:
        told = [
            token_body(entry) | {"top_logprobs": [token_body(top) for top in entry["top"]]}
            for entry in answer["logprobs"]
        ]
        logprobs = {"content": told} if told else None
        return {"index": index, **body, "logprobs": logprobs, "finish_reason": answer["finish_reason"]}


class CompletionShape:
    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"

    def __init__(self):
        self._offsets: Counter[int] = Counter()  # characters of each answer's tokens so far

    def choice(self, index: int, answer: Event) -> dict:
        prompt = answer.get("prompt", {"text": "", "logprobs": []})
        told = prompt["logprobs"] + answer["logprobs"]
        return {
            "index": index,
            "text": prompt["text"] + answer["text"],
            "logprobs": self._logprobs(index, told) if told else None,
            "finish_reason": answer["finish_reason"],
        }

    def delta(self, index: int, answer: Event, *, first: bool) -> dict:
        return self.choice(index, answer)

    def _logprobs(self, index: int, told: list[Event]) -> dict:
        offsets = []
        for entry in told:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(entry["token"])
        return {
            "tokens": [entry["token"] for entry in told],
            "token_logprobs": [entry["logprob"] for entry in told],
            "top_logprobs": [
                None if entry["logprob"] is None else {top["token"]: top["logprob"] for top in entry["top"]}
                for entry in told
            ],
            "text_offset": offsets,
        }


def token_body(entry: Event) -> dict:
    """`bytes` is null for a token that holds only part of a character."""
    text = entry["token"]
    return {
        "token": text,
        "logprob": entry["logprob"],
        "bytes": None if "\ufffd" in text else list(text.encode()),
    }


Shape = ChatShape | CompletionShape


def server_event(body: dict) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
