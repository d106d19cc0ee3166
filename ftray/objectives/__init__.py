"""(log-probabilities, row) -> Loss(sum, count). Pure tensor maths: no ray, no deepspeed, no ranks."""

from collections.abc import Callable

from ftray.objectives.dpo import make_dpo
from ftray.objectives.loss import LogProbs, Loss, Objective
from ftray.objectives.sft import make_sft, sft_loss

# By `objective.type`; each takes the other keys of the config's section.
OBJECTIVES: dict[str, Callable[..., Objective]] = {"sft": make_sft, "domain": make_sft, "dpo": make_dpo}

__all__ = ["OBJECTIVES", "LogProbs", "Loss", "Objective", "make_dpo", "make_sft", "sft_loss"]
