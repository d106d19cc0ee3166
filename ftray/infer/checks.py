"""What any engine refuses before it queues a request."""

from collections.abc import Container, Iterable
from typing import Any

from ftray.errors import AdapterError, RequestError, UserError
from ftray.infer.protocol import Request, SamplingParams


def check_token_ids(ids: Iterable[Any], *, key: str, vocab_size: int) -> None:
    for token in ids:
        if not isinstance(token, int) or not 0 <= token < vocab_size:
            raise UserError(f"{key}: {token!r} is no token id of this model (0 to {vocab_size - 1})")


def check_request(request: Request, *, context_tokens: int, vocab_size: int, loaded: Container[str]) -> int:
    """Returns how many tokens the answer may have. Raises `UserError` for a request that can never run."""
    check_sampling(request.sampling)
    num_prompt = len(request.prompt_ids)
    if num_prompt == 0:
        raise UserError("the prompt is empty")
    room = context_tokens - num_prompt
    if room < 1:
        raise too_long(f"{num_prompt}", context_tokens=context_tokens)
    extremes = [int(min(request.prompt_ids)), int(max(request.prompt_ids))]  # a tokenizer may have more than the model
    check_token_ids(extremes, key="prompt", vocab_size=vocab_size)
    check_token_ids(request.sampling.logit_bias, key="logit_bias", vocab_size=vocab_size)
    if request.adapter is not None and request.adapter not in loaded:
        raise UserError(f"{request.adapter}: not loaded in this engine")
    return min(request.sampling.max_tokens or room, room)


def too_long(tokens: str, *, context_tokens: int, param: str = "messages") -> RequestError:
    """In OpenAI's words and with its code, by which clients know that a shorter prompt helps."""
    return RequestError(
        f"This model's maximum context length is {context_tokens} tokens (engine.context_tokens). However, your "
        f"{param} resulted in {tokens} tokens, and an answer needs room too. Please reduce the length of the {param}.",
        code="context_length_exceeded",
        param=param,
    )


def check_sampling(sampling: SamplingParams) -> None:
    """One value out of its range would end a step, and with it everybody's answers."""
    rules = {
        "temperature": (sampling.temperature >= 0, "at least 0"),
        "top_p": (0 < sampling.top_p <= 1, "over 0 and at most 1"),
        "top_k": (sampling.top_k >= 0, "at least 0 (0: all)"),
        "min_p": (0 <= sampling.min_p <= 1, "from 0 to 1"),
        "repetition_penalty": (sampling.repetition_penalty > 0, "over 0"),
        "n": (sampling.n >= 1, "at least 1"),
        "max_tokens": (sampling.max_tokens is None or sampling.max_tokens >= 1, "at least 1"),
        "logprobs": (sampling.logprobs is None or sampling.logprobs >= 0, "at least 0"),
        "prompt_logprobs": (sampling.prompt_logprobs is None or sampling.prompt_logprobs >= 0, "at least 0"),
    }
    for key, (holds, rule) in rules.items():
        if not holds:
            raise UserError(f"{key}: {getattr(sampling, key)} is out of range: it must be {rule}")


def check_unused(key: str, in_flight: Iterable[Request]) -> None:
    """Before an adapter goes, or other weights come under its key. Raises `AdapterError`."""
    if any(request.adapter == key for request in in_flight):
        raise AdapterError(f"{key}: answers that use it have not ended; its weights stay until then")
