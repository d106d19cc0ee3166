"""The language model's own output head: log-probabilities of the next token."""

from typing import TYPE_CHECKING, Any

from ftray.model.families.logits import logits_of

if TYPE_CHECKING:
    from torch import Tensor


class CausalLmHead:
    task_type = "CAUSAL_LM"
    saved_modules: tuple[str, ...] = ()

    def __call__(self, model: Any, hidden_NE: "Tensor", targets_N: "Tensor") -> "Tensor":
        from torch.nn.functional import cross_entropy

        finish = logits_of(model.config.get_text_config())
        logits_NV = finish(model.get_output_embeddings()(hidden_NE)).float()
        return -cross_entropy(logits_NV, targets_N, reduction="none")

    def parameters(self, config: Any) -> int:
        return config.vocab_size * config.hidden_size


CAUSAL_LM = CausalLmHead()
