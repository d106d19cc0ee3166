"""What the engine says of a token, as the ingress gets it: ids become text."""

from collections.abc import Callable, Sequence

from ftray.infer.protocol import TokenEvent, TokenLogprobs
from ftray.infer.token_bytes import TokenBytes
from ftray.serve.protocol import EchoedPrompt, TokenLogprob, Tokens

Decode = Callable[[list[int]], str]


def tokens_of(event: TokenEvent, index: int, decode: Decode, raw: TokenBytes) -> Tokens:
    """`index`: of the answer among all of the request."""
    return Tokens(
        index=index,
        is_first_answer=event.index == 0,
        num_tokens=int(event.token_id >= 0),  # an answer may end without another
        text=event.text,
        finish_reason=event.finish_reason,
        cached_tokens=event.num_cached_prompt_tokens,
        logprobs=() if event.logprobs is None else (logprob_of(event.token_id, event.logprobs, decode, raw),),
    )


def logprob_of(token_id: int, logprobs: TokenLogprobs, decode: Decode, raw: TokenBytes) -> TokenLogprob:
    def of_one(token: int, logprob: float, top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
        text = decode([token])
        return TokenLogprob(text, logprob, top, raw.of(token) if "\ufffd" in text else None)

    return of_one(token_id, logprobs.chosen, tuple(of_one(token, logprob) for token, logprob in logprobs.top))


def echoed(ids: list[int], logprobs: Sequence[TokenLogprobs] | None, decode: Decode, raw: TokenBytes) -> EchoedPrompt:
    """A prompt's text, and its tokens if they are asked for."""
    if logprobs is None:
        return EchoedPrompt(decode(ids))
    others = (logprob_of(token, of, decode, raw) for token, of in zip(ids[1:], logprobs, strict=True))
    return EchoedPrompt(decode(ids), (TokenLogprob(decode(ids[:1]), None), *others))
