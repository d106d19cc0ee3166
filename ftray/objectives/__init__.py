"""(log-probabilities, row) -> Loss(sum, count). Pure tensor maths: no ray, no deepspeed, no ranks."""

from ftray.objectives.loss import Loss, Objective
from ftray.objectives.sft import sft_loss

OBJECTIVES: dict[str, Objective] = {"sft": sft_loss}

__all__ = ["OBJECTIVES", "Loss", "Objective", "sft_loss"]
