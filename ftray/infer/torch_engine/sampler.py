"""From logits to the next token of a sequence, by its own parameters and its own random numbers.

Shapes: n sequences, V vocabulary.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ftray.infer.protocol import SamplingParams, TokenLogprobs
from ftray.infer.seeds import derived_seed

# Dividing logits by less would overflow float32; the distribution is a single token long before.
GREEDY_BELOW = 1e-5
# A nucleus nearly always lies within so many tokens; sorting the whole vocabulary takes ten times as long.
NUCLEUS_CANDIDATES = 1024


class Matcher(Protocol):
    """Which tokens may come next (`structure.py`)."""

    def mask(self, logits_V: Tensor) -> None: ...

    def accept(self, token: int) -> None: ...

    @property
    def has_failed(self) -> bool: ...


def make_generator(sampling: SamplingParams, *, index: int = 0) -> torch.Generator | None:
    """A seed gives the same tokens whatever else is in the batch; each of n answers has its own."""
    if sampling.temperature < GREEDY_BELOW:
        return None
    generator = torch.Generator()
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(derived_seed(sampling.seed, index))
    return generator


class TokenSampler:
    def __init__(self, sampling: SamplingParams, *, index: int = 0, matcher: Matcher | None = None):
        self.sampling = sampling
        self.matcher = matcher
        self._generator = make_generator(sampling, index=index)

    @property
    def has_failed(self) -> bool:
        return self.matcher is not None and self.matcher.has_failed

    @property
    def is_plain(self) -> bool:
        """Greedy and nothing else."""
        s = self.sampling
        return self._generator is None and not self._changes_logits and s.logprobs is None

    @property
    def _changes_logits(self) -> bool:
        s = self.sampling
        penalised = s.frequency_penalty or s.presence_penalty or s.repetition_penalty != 1
        return bool(penalised or s.logit_bias or self.matcher is not None)

    def pick(
        self, logits_V: Tensor, prompt: Sequence[int], generated: Sequence[int]
    ) -> tuple[int, TokenLogprobs | None]:
        """Of float32 logits on the CPU."""
        # A broken adapter must not end the step of all others.
        finite = bool(torch.isfinite(logits_V).all())
        scores_V = logits_V if finite else logits_V.nan_to_num()
        if self._changes_logits:
            scores_V = self._changed(scores_V, prompt, generated)
        # Nothing to draw from where a score is NaN or infinity, or none is left.
        greedy = self._generator is None or not finite or not torch.isfinite(scores_V.max())
        token = int(scores_V.argmax()) if greedy else draw(scores_V, self.sampling, self._generator)
        if self.matcher is not None:
            self.matcher.accept(token)
        return token, None if self.sampling.logprobs is None else logprobs_of(
            logits_V.nan_to_num(), token, self.sampling.logprobs
        )

    def _changed(self, logits_V: Tensor, prompt: Sequence[int], generated: Sequence[int]) -> Tensor:
        s = self.sampling
        scores_V = logits_V.clone()
        if s.repetition_penalty != 1:
            seen = torch.tensor([*prompt, *generated]).unique()
            before = scores_V[seen]
            scores_V[seen] = torch.where(before > 0, before / s.repetition_penalty, before * s.repetition_penalty)
        if generated and (s.frequency_penalty or s.presence_penalty):
            answered, counts = torch.tensor(generated).unique(return_counts=True)
            scores_V[answered] -= s.frequency_penalty * counts + s.presence_penalty
        for token, bias in s.logit_bias.items():
            scores_V[token] += bias
        if self.matcher is not None:
            self.matcher.mask(scores_V)
        return scores_V


def sample(
    logits_nV: Tensor,
    samplers: Sequence[TokenSampler],
    contexts: Sequence[tuple[Sequence[int], Sequence[int]]],
) -> list[tuple[int, TokenLogprobs | None]]:
    """`contexts`: prompt and answer so far of each sequence."""
    likeliest = logits_nV.argmax(dim=-1).tolist()
    picked: list[tuple[int, TokenLogprobs | None]] = [(token, None) for token in likeliest]
    for row, (sampler, (prompt, generated)) in enumerate(zip(samplers, contexts, strict=True)):
        if not sampler.is_plain:
            picked[row] = sampler.pick(logits_nV[row].float().cpu(), prompt, generated)
    return picked


def draw(logits_V: Tensor, sampling: SamplingParams, generator: torch.Generator | None) -> int:
    """Temperature, min-p (Nguyen et al. 2024, arXiv 2407.01082), top-k, then nucleus sampling (Holtzman et al. 2020,
    arXiv 1904.09751) within what is left."""
    p_V = torch.softmax((logits_V - logits_V.max()) / sampling.temperature, dim=-1)
    if sampling.min_p > 0:
        p_V = torch.where(p_V >= sampling.min_p * p_V.max(), p_V, 0)
    if sampling.top_k == 0 and sampling.top_p >= 1:
        return invert_cdf(p_V, generator)
    p, order = p_V.topk(min(sampling.top_k or NUCLEUS_CANDIDATES, len(p_V)))
    if sampling.top_k == 0 and p.sum() < sampling.top_p * p_V.sum():
        p, order = p_V.sort(descending=True, stable=True)
    if sampling.top_p < 1:
        total = p.sum() if sampling.top_k else p_V.sum()
        outside = p.cumsum(-1) - p >= sampling.top_p * total
        outside[0] = False  # also where the right side is too small a number for a float
        p = p.masked_fill(outside, 0)
    return int(order[invert_cdf(p, generator)])


def invert_cdf(weights: Tensor, generator: torch.Generator | None) -> int:
    cdf = weights.double().cumsum(-1)
    threshold = torch.rand(1, generator=generator, dtype=torch.float64) * cdf[-1]
    return min(int(torch.searchsorted(cdf, threshold, right=True)), int(weights.nonzero()[-1]))


def logprobs_of(logits_V: Tensor, token: int, num_top: int) -> TokenLogprobs:
    log_probs_V = torch.log_softmax(logits_V, dim=-1)
    values, tokens = log_probs_V.topk(min(num_top, len(log_probs_V)))
    return TokenLogprobs(float(log_probs_V[token]), tuple(zip(tokens.tolist(), values.tolist(), strict=True)))
