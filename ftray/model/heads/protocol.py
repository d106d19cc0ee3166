"""What a head is: what is made of the hidden states at the rows that an objective looks at.

Shapes: N rows, E hidden size.
"""

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor


@runtime_checkable
class Head(Protocol):
    """A user's own is `Objective(..., head="module:NAME")`."""

    @property
    def task_type(self) -> str:
        """PEFT's, in adapter_config.json."""
        ...

    @property
    def saved_modules(self) -> tuple[str, ...]:
        """Names of the model's modules that are trained whole beside an adapter, and saved with it."""
        ...

    def __call__(self, model: Any, hidden_NE: "Tensor", targets_N: "Tensor") -> "Tensor":
        """[N], float32: what the objective gets as its log-probabilities."""
        ...

    def parameters(self, config: Any) -> int:
        """That each row is multiplied by, for counting FLOPs. `config`: transformers' config of the text model."""
        ...
