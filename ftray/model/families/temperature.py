"""Attention temperature by position (Nakanishi 2025, arXiv 2501.19399; Llama 4): queries of layers without rotary
positions grow with their place in the sequence. transformers counts places in the row; here they are each sequence's.

Shapes: T tokens in the row, O output features of the query projection.
"""

from typing import Any

import torch
from torch import Tensor, nn


class QueryTemperature:
    """Takes the place of what a decoder's attention layers do themselves, where they do it."""

    def __init__(self, decoder: nn.Module):
        self._positions_T: Tensor | None = None
        for module in decoder.modules():
            layer: Any = module
            if getattr(layer, "attn_temperature_tuning", False) and not getattr(layer, "use_rope", True):
                layer.attn_temperature_tuning = False
                layer.q_proj.register_forward_hook(self._scaled(layer.floor_scale, layer.attn_scale))

    def of_row(self, positions_T: Tensor) -> None:
        self._positions_T = positions_T

    def _scaled(self, floor_scale: float, attn_scale: float) -> Any:
        def hook(module: nn.Module, inputs: Any, query_1TO: Tensor) -> Tensor:
            assert self._positions_T is not None
            steps_T = torch.floor((self._positions_T.to(query_1TO.device).float() + 1.0) / floor_scale)
            return query_1TO * (torch.log1p(steps_T) * attn_scale + 1.0).to(query_1TO.dtype)[None, :, None]

        return hook
