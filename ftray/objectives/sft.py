"""Supervised fine-tuning: the negative log-likelihood of the answer tokens (Ouyang et al. 2022, arXiv 2203.02155)."""

from torch import Tensor

from ftray.objectives.loss import Loss


def sft_loss(log_probs_N: Tensor, weights_N: Tensor) -> Loss:
    """Sum over trained tokens of -log p(token | what is before it in its example)."""
    return Loss(sum=-(log_probs_N * weights_N).sum(), count=weights_N.sum())
