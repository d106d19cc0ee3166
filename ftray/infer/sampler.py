"""From logits to the next token of each sequence, each by its own parameters and its own random numbers.

Shapes: n sequences, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ftray.infer.protocol import Sampling

# Dividing logits by less would overflow float32; the distribution is a single token long before.
GREEDY_BELOW = 1e-5


def make_generator(sampling: Sampling) -> torch.Generator | None:
    """A seed gives the same tokens whatever else is in the batch."""
    if sampling.temperature < GREEDY_BELOW:
        return None
    generator = torch.Generator()
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed % 2**63)
    return generator


def sample(logits_nV: Tensor, samplings: Sequence[Sampling], generators: Sequence[torch.Generator | None]) -> list[int]:
    tokens = logits_nV.argmax(dim=-1).tolist()
    for row, (sampling, generator) in enumerate(zip(samplings, generators, strict=True)):
        if generator is not None:
            tokens[row] = draw(logits_nV[row].float().cpu(), sampling, generator)
    return tokens


def draw(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Temperature, then nucleus sampling (Holtzman et al. 2020, arXiv 1904.09751)."""
    if not torch.isfinite(logits_V).all():
        return int(logits_V.nan_to_num().argmax())  # one broken adapter must not end the step of all others
    probabilities = torch.softmax((logits_V - logits_V.max()) / sampling.temperature, dim=-1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(descending=True, stable=True)
        outside = ordered.cumsum(-1) - ordered >= sampling.top_p  # the first token is always inside
        ordered[outside] = 0
        return int(order[torch.multinomial(ordered, 1, generator=generator)])
    return int(torch.multinomial(probabilities, 1, generator=generator))
