"""Model FLOPs of training, and the matmul rate they are measured against (MFU, Chowdhery et al. 2022, arXiv 2204.02311,
appendix B). Recomputed activations and the small LoRA matmuls are not counted: they are not the model's work.
"""

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftray.model.families import LayerKind, layer_kinds
from ftray.model.heads import CAUSAL_LM, Head

if TYPE_CHECKING:  # what is counted once is kept, and read without torch (plan/measure.py)
    from ftray.model.hardware import Hardware

GEMM_SIZE = {"cpu": 1024, "cuda": 8192}
GEMM_REPEATS = 8
# What configs call the number of a token's experts, and of all.
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


@dataclass(frozen=True)
class ModelFlops:
    linear_parameters: int  # of all decoder layers: 2 FLOPs a token each, forward
    head_parameters: int  # output head: at trained positions alone
    layers: tuple[LayerKind, ...]  # their attention

    def as_object(self) -> dict[str, float]:
        """For JSON; `attention_size` is layers x query heads x head dimension."""
        attention = sum(layer.flops({1: 1}) for layer in self.layers) / 2
        return {
            "linear_parameters": self.linear_parameters,
            "head_parameters": self.head_parameters,
            "attention_size": attention,
        }

    def forward(self, *, num_tokens: int, num_trained: int, lengths: Mapping[float, float]) -> float:
        """`lengths`: how many sequences there are of each."""
        matmuls = 2.0 * (self.linear_parameters * num_tokens + self.head_parameters * num_trained)
        times = Counter(self.layers)
        return matmuls + sum(layer.flops(lengths) * count for layer, count in times.items())

    def step(
        self,
        *,
        num_tokens: int,
        num_trained: int,
        lengths: Mapping[float, float],
        trains_base: bool,
        reference: bool,
    ) -> float:
        """Backward costs a forward for the activations' gradients, and one more for those of trained weights."""
        once = self.forward(num_tokens=num_tokens, num_trained=num_trained, lengths=lengths)
        return once * (2 + trains_base + reference)


def count_flops(model: Any, head: Head = CAUSAL_LM) -> ModelFlops:
    """Of a causal LM before or after PEFT's injection, sharded by ZeRO-3 or quantised or not."""
    from torch import nn

    from ftray.model.adapters.experts import num_expert_weights
    from ftray.model.packed import decoder_of

    config = model.config.get_text_config()
    lm_head = model.get_output_embeddings()
    linear = [
        module
        for name, module in decoder_of(model).named_modules()
        if isinstance(module, nn.Linear) and module is not lm_head and ".lora_" not in name and "lm_head" not in name
    ]
    return ModelFlops(
        linear_parameters=sum(module.in_features * module.out_features for module in linear)
        + round(num_expert_weights(model) * active_share(config)),
        head_parameters=head.parameters(config),
        layers=layer_kinds(config),
    )


def active_share(config: Any) -> float:
    """Of a mixture's experts: how many each token goes through."""
    chosen, total = (
        next((value for name in names if (value := getattr(config, name, None))), 1) for names in (CHOSEN, EXPERTS)
    )
    return chosen / total


def measure_gemm_rate(hardware: "Hardware") -> float:
    """FLOPs a second of a large square matmul on this worker's device, in its dtype; the best of a few."""
    import torch

    size = GEMM_SIZE[hardware.device.type]
    a = torch.randn(size, size, device=hardware.device, dtype=hardware.dtype)
    out = torch.empty_like(a)
    best = float("inf")
    for _ in range(GEMM_REPEATS):
        synchronize(hardware)
        began = time.perf_counter()
        torch.mm(a, a, out=out)
        synchronize(hardware)
        best = min(best, time.perf_counter() - began)
    return 2.0 * size**3 / best


def synchronize(hardware: "Hardware") -> None:
    import torch

    if hardware.device.type == "cuda":
        torch.cuda.synchronize(hardware.device)
