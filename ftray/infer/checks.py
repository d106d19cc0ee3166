"""What any engine refuses before it queues a request."""

from ftray.errors import UserError
from ftray.infer.protocol import Request


def check_request(request: Request, *, context_tokens: int, vocab_size: int) -> int:
    """Returns how many tokens the answer may have. Raises `UserError` for a request that can never run."""
    num_prompt, wanted = len(request.prompt_ids), request.sampling.max_tokens
    if num_prompt == 0:
        raise UserError("the prompt is empty")
    if num_prompt + (wanted or 1) > context_tokens:
        raise UserError(
            f"prompt of {num_prompt} tokens and max_tokens {wanted or 1} exceed this endpoint's context of "
            f"{context_tokens} tokens (engine.context_tokens); shorten the prompt or lower max_tokens"
        )
    unknown = next((token for token in request.sampling.logit_bias if not 0 <= token < vocab_size), None)
    if unknown is not None:
        raise UserError(f"logit_bias: {unknown} is no token id of this model (0 to {vocab_size - 1})")
    return wanted if wanted is not None else context_tokens - num_prompt
