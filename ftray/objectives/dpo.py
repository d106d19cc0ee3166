"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290, equation 7).

Sequences 2i and 2i + 1 of a row are the chosen and the rejected answer to one prompt. Shapes: P pairs.
"""

from typing import TYPE_CHECKING, Literal

from ftray.objectives.protocol import LogProbs, Loss, LossFunction, Objective, Row
from ftray.schema import PositiveFloat, Strict

if TYPE_CHECKING:
    from torch import Tensor


class DpoConfig(Strict):
    """Preference pairs (Rafailov et al. 2023). With LoRA the reference is the base with the adapter off."""

    type: Literal["dpo"]
    beta: PositiveFloat = 0.1


def make_loss(config: DpoConfig) -> LossFunction:
    from torch.nn.functional import logsigmoid

    def dpo_loss(log_probs: LogProbs, row: Row) -> Loss:
        """Sum over pairs; the metrics are TRL's: implicit rewards, their margin, and how often chosen wins."""
        assert log_probs.reference_N is not None
        chosen_P, rejected_P = answer_sums(log_probs.policy_N - log_probs.reference_N, row) * config.beta
        weights_P = answer_sums(row.weights_N, row)[0].clamp(max=1.0)  # 0 for the pair of a dummy row
        margin_P = chosen_P - rejected_P
        loss_P = -logsigmoid(margin_P)
        metrics = {
            "reward_chosen": chosen_P,
            "reward_rejected": rejected_P,
            "reward_margin": margin_P,
            "reward_accuracy": (margin_P > 0).to(margin_P),
        }
        return Loss(
            sum=(loss_P * weights_P).sum(),
            count=weights_P.sum(),
            metrics={name: (value * weights_P).sum().detach() for name, value in metrics.items()},
        )

    return dpo_loss


def answer_sums(values_N: "Tensor", row: Row) -> "Tensor":
    """[2, P]: sums over the targets of each chosen and of each rejected answer."""
    sums_S = values_N.new_zeros(row.num_sequences).index_add(0, row.sequences_N, values_N * row.weights_N)
    return sums_S.view(-1, 2).T


DPO = Objective(DpoConfig, make_loss, shape="pair", unit="example", needs_reference=True)
