"""What vLLM hands over, as the engine protocol's events. No vllm here."""

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ftray.infer.protocol import FinishReason, Request, TokenEvent, TokenLogprobs


@dataclass(eq=False)
class Answering:
    request: Request
    params: Any
    lora: Any  # of vLLM, the version that answers; None: the base
    started: bool = False  # vLLM has it, or is about to
    task: Any = None  # in the event loop, from then on
    added_at: float = field(default_factory=time.monotonic)
    queued_s: float = 0.0  # until vLLM got it
    passed_over: int = 0
    num_ended: int = 0  # of its n answers
    num_generated: Counter[int] = field(default_factory=Counter)


def token_events(answering: Answering, part: Any, cached: int) -> Iterator[TokenEvent]:
    """vLLM may hand over several tokens at once, with their text: it goes with the last."""
    tokens = list(part.token_ids)
    if not tokens and part.finish_reason is not None:  # as of a request that vLLM itself gives up
        index, count = part.index, answering.num_generated[part.index]
        yield TokenEvent(answering.request.id, -1, part.text, count, finish_reason(part), index=index)
    num_top = answering.request.sampling.logprobs
    for place, token in enumerate(tokens):
        is_last = place == len(tokens) - 1
        reason: FinishReason | None = None
        if is_last and part.finish_reason is not None:
            reason = finish_reason(part)
        answering.num_generated[part.index] += 1
        yield TokenEvent(
            answering.request.id,
            token,
            part.text if is_last else "",
            answering.num_generated[part.index],
            reason,
            index=part.index,
            num_cached_prompt_tokens=cached,
            logprobs=logprobs_of(part.logprobs[place], token, num_top) if part.logprobs else None,
            queued_s=answering.queued_s,
        )


def finish_reason(part: Any) -> FinishReason:
    return part.finish_reason if part.finish_reason in ("stop", "length") else "error"


def logprobs_of(found: dict[int, Any], token: int, num_top: int | None) -> TokenLogprobs:
    """vLLM tells the likeliest tokens and the chosen one in one table."""
    likeliest = sorted(((t, entry.logprob) for t, entry in found.items()), key=lambda pair: -pair[1])
    return TokenLogprobs(found[token].logprob, tuple(likeliest[: num_top or 0]))
