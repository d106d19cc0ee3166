"""How answers are laid out: OpenAI's chat and completion objects, whole and in chunks."""

import json

from ftray.serve.replica import Event


class ChatShape:
    """How a chat answer is laid out, whole and in chunks."""

    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    @staticmethod
    def choice(index: int, answer: Event) -> dict:
        message = {"role": "assistant", "content": answer["text"]}
        return ChatShape._around(index, answer, {"message": message})

    @staticmethod
    def delta(index: int, answer: Event, *, first: bool) -> dict:
        role = {"role": "assistant"} if first else {}
        return ChatShape._around(index, answer, {"delta": role | {"content": answer["text"]}})

    @staticmethod
    def _around(index: int, answer: Event, body: dict) -> dict:
        told = [
            token_body(entry) | {"top_logprobs": [token_body(top) for top in entry["top"]]}
            for entry in answer["logprobs"]
        ]
        logprobs = {"content": told} if told else None
        return {"index": index, **body, "logprobs": logprobs, "finish_reason": answer["finish_reason"]}


class CompletionShape:
    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"

    @staticmethod
    def choice(index: int, answer: Event) -> dict:
        told = answer["logprobs"]
        logprobs = {
            "tokens": [entry["token"] for entry in told],
            "token_logprobs": [entry["logprob"] for entry in told],
            "top_logprobs": [{top["token"]: top["logprob"] for top in entry["top"]} for entry in told],
        }
        return {
            "index": index,
            "text": answer["text"],
            "logprobs": logprobs if told else None,
            "finish_reason": answer["finish_reason"],
        }

    @staticmethod
    def delta(index: int, answer: Event, *, first: bool) -> dict:
        return CompletionShape.choice(index, answer)


def token_body(entry: Event) -> dict:
    """`bytes` is null for a token that holds only part of a character."""
    text = entry["token"]
    return {
        "token": text,
        "logprob": entry["logprob"],
        "bytes": None if "\ufffd" in text else list(text.encode()),
    }


Shape = type[ChatShape] | type[CompletionShape]


def server_event(body: dict) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
