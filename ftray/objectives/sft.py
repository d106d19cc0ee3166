"""Maximum likelihood of the trained tokens: the answers' in supervised fine-tuning (Ouyang et al. 2022, arXiv
2203.02155), all of a document's in domain adaptation (Gururangan et al. 2020, arXiv 2004.10964)."""

from typing import Literal

from ftray.objectives.protocol import LogProbs, Loss, LossFunction, Objective, Row, TrainedTurns
from ftray.schema import Strict


class SftConfig(Strict):
    """Conversations: the assistant's tokens are trained."""

    type: Literal["sft"] = "sft"
    train_on: Literal["all", "last", "by_weight"] = "all"
    """last: of a conversation the last answer; by_weight: answers whose message says weight: 1 or train: true. One that
    says 0 or false is never trained."""
    train_reasoning: bool = True
    """false: thoughts are read, and not trained."""

    @property
    def trained_turns(self) -> TrainedTurns:
        return TrainedTurns(self.train_on, self.train_reasoning)


class TextConfig(Strict):
    """Documents: every token is trained."""

    type: Literal["text"]


def sft_loss(log_probs: LogProbs, row: Row) -> Loss:
    """Sum over trained tokens of -log p(token | what is before it in its example)."""
    return Loss(sum=-(log_probs.policy_N * row.weights_N).sum(), count=row.weights_N.sum())


def make_loss(config: Strict) -> LossFunction:
    return sft_loss


SFT = Objective(SftConfig, make_loss, shape="conversation")
TEXT = Objective(TextConfig, make_loss, shape="document")
