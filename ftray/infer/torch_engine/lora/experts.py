"""Adapters on the experts of a mixture, token by token: those of one adapter go through the experts with its update
added to their weights, W + B A, made anew in each step. The cost does not depend on how many they are.

Shapes: T tokens in the row, X chosen experts of each, E hidden size.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ftray.infer.torch_engine.lora.batch import Span
from ftray.infer.torch_engine.lora.slots import Place
from ftray.model.adapters.experts import expert_update, is_transposed


def takes_chosen(module: nn.Module) -> bool:
    """Tokens, each with its chosen experts and their weights. Llama 4's get tokens sorted by expert: no adapter."""
    return len(inspect.signature(module.forward).parameters) == 3


class AdaptedExperts:
    """Takes the place of an experts module's forward."""

    def __init__(self, name: str, module: nn.Module, parameters: list[str], spans: Callable[[], Sequence[Span]]):
        """`spans`: of the step that is computed."""
        self._name, self._module, self._parameters, self._spans = name, module, parameters, spans
        self._whole: Callable[..., Tensor] = module.forward
        module.forward = self._forward

    def _forward(self, hidden_TE: Tensor, chosen_TX: Tensor, weights_TX: Tensor) -> Tensor:
        inputs = hidden_TE, chosen_TX, weights_TX
        parts, at = [], 0
        for place, first, count in sorted(self._spans(), key=lambda span: span[1]):
            if (changed := self._changed(place)) is None:
                continue
            if at < first:
                parts.append(self._whole(*(x[at:first] for x in inputs)))
            at = first + count
            parts.append(self._with(changed, *(x[first:at] for x in inputs)))
        if at < len(hidden_TE):
            parts.append(self._whole(*(x[at:] for x in inputs)))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _with(self, changed: dict[str, Tensor], *inputs: Tensor) -> Tensor:
        self._module.forward = self._whole
        try:
            return functional_call(self._module, changed, inputs)
        finally:
            self._module.forward = self._forward

    def _changed(self, place: Place) -> dict[str, Tensor] | None:
        """Its parameters with this adapter; None: it leaves them as they are."""
        changed: dict[str, Tensor] = {}
        for parameter in self._parameters:
            factors = place.slab.factors.get(f"{self._name}.{parameter}")
            if factors is not None:
                weight: Any = getattr(self._module, parameter)
                a, bt = factors.a[place.slot].to(weight.dtype), factors.bt[0][place.slot].to(weight.dtype)
                update = expert_update(a, bt, len(weight))
                changed[parameter] = weight + (update.transpose(1, 2) if is_transposed(self._module) else update)
        return changed or None
