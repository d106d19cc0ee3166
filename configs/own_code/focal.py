"""An objective of one's own: focal loss (Lin et al. 2017, eq. 4) on the answers' tokens. It counts a token that the
model is sure of for less: (1 - p)^gamma times its negative log-likelihood. gamma 0 is `sft`."""

from ftray.objectives import Loss, Objective
from ftray.schema import NonNegativeFloat, Strict


class Focal(Strict):
    type: str
    gamma: NonNegativeFloat = 1.0


def make_loss(config):
    def loss(log_probs, row):
        likelihoods_N = log_probs.policy_N.exp()
        losses_N = -((1 - likelihoods_N) ** config.gamma) * log_probs.policy_N
        return Loss(sum=(losses_N * row.weights_N).sum(), count=row.weights_N.sum())

    return loss


FOCAL = Objective(Focal, make_loss, shape="conversation")
