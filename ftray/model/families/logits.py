"""What an architecture does to its logits after the output head: a factor (Cohere, Granite; Yang et al. 2022, arXiv
2203.03466), a soft cap (Gemma 2, arXiv 2408.00118)."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

FACTORS = ("logit_scale", "lm_head_multiplier")
DIVISOR = "logits_scaling"
MULTIPLIED_BY_ITS_DIVISOR = ("hyperclovax",)


def logits_of(config: Any) -> Callable[["Tensor"], "Tensor"]:
    """What makes logits of an output head's product. `config`: of the text model."""
    factor = 1.0
    for name in FACTORS:
        factor *= getattr(config, name, None) or 1.0
    divisor = getattr(config, DIVISOR, None) or 1.0
    factor = factor * divisor if config.model_type in MULTIPLIED_BY_ITS_DIVISOR else factor / divisor
    cap = getattr(config, "final_logit_softcapping", None)

    def finish(product: "Tensor") -> "Tensor":
        scaled = product if factor == 1.0 else product * factor
        return scaled if cap is None else (scaled / cap).tanh() * cap

    return finish
