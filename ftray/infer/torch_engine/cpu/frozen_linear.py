"""Linear layers whose weight never changes: on a CPU the weight is laid out once as the kernels read it, and
projections of one input (q, k and v; gate and up) become one multiplication.

Without kernels of our own (`cpu/kernels.py`) oneDNN has such a layout too.

Shapes: T tokens, O summed output features.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ftray.infer.torch_engine.cpu.huge_pages import HugePages
from ftray.infer.torch_engine.cpu.kernels import AdaptersArray, CpuKernels, Layers, RmsNorm
from ftray.model.adapters.linear import linear_modules

# Projections that a decoder layer applies to the same tensor, in the order it calls them.
JOINED = ("q_proj", "k_proj", "v_proj")  # their outputs are used side by side
GATED = ("gate_proj", "up_proj")
SIBLINGS = (JOINED, GATED)
# The number of tokens that oneDNN's layout is chosen for. Others use it too: 1 to 512 were all faster than unpacked.
PACKED_FOR_TOKENS = 16
# (up to so many tokens, in steps of so many)
BUCKETS = ((16, 1), (128, 16))
WIDEST = 64


def weight_of(layer: Any) -> Tensor:
    """[O, I]; transformers' Conv1D, of GPT-2, has it transposed."""
    return layer.weight if isinstance(layer, nn.Linear) else layer.weight.t()


def can_reorder(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()


class FrozenLinear:
    """The outputs of several linear layers side by side, [..., O]. For inference: no gradient."""

    def __init__(self, layers: Sequence[nn.Linear], kernels: CpuKernels | None, memory: HugePages | None = None):
        """`memory`: where the kernels' layout goes, beside that of other layers."""
        weights = [weight_of(layer) for layer in layers]
        weight = (torch.cat(weights) if len(weights) > 1 else weights[0].contiguous()).detach()
        bias = joined_bias(layers)
        self.kernels = kernels
        if kernels is not None:
            self.layers = Layers.packed(weight, bias, memory)
            return
        self._weight, self._bias = weight, bias
        self._reordered = can_reorder(weight)
        if self._reordered:
            reorder: Any = torch.ops.mkldnn._reorder_linear_weight  # what torch's own freezing pass uses
            self._weight = reorder(weight, PACKED_FOR_TOKENS)

    def __call__(
        self,
        x: Tensor,
        *,
        norm: RmsNorm | None = None,
        residual: Tensor | None = None,
        adapters: AdaptersArray | None = None,
        output: int = 0,
        next_adapters: AdaptersArray | None = None,
    ) -> Tensor:
        """W x + b + residual. A norm of x and adapters, of output number `output` of their group and of what is
        computed next, are for the kernels alone."""
        if self.kernels is not None:
            return self.kernels.linear(
                self.layers,
                x,
                norm=norm,
                residual=residual,
                adapters=adapters,
                output=output,
                next_adapters=next_adapters,
            )
        assert adapters is None
        assert norm is None
        if not self._reordered:
            out = linear(x, self._weight, self._bias)
            return out if residual is None else out.add_(residual)
        if residual is None:
            out = torch.ops.mkldnn._linear_pointwise(bucketed(x), self._weight, self._bias, "none", [], "")
        else:
            add = torch.ops.mkldnn._linear_pointwise.binary
            out = add(bucketed(x), bucketed(residual), self._weight, self._bias, "add")
        return like_rows(out, x)


class GatedKernel:
    """silu(first) * second, in one go. Where there are kernels."""

    def __init__(self, first: FrozenLinear, second: FrozenLinear):
        assert first.kernels is not None
        self._kernels, self.layers = first.kernels, first.layers.beside(second.layers)

    def __call__(self, x: Tensor, *, norm: RmsNorm, adapters: AdaptersArray | None) -> Tensor:
        return self._kernels.linear(self.layers, x, norm=norm, adapters=adapters)


def bucketed(x: Tensor) -> Tensor:
    """With rows of zeros up to the next of few numbers. For every shape that it has met oneDNN keeps a kernel with its
    memory, up to a thousand of them: a replica would grow by hundreds of MiB, and each new shape costs milliseconds."""
    count = x.numel() // x.shape[-1]
    size = bucket(count)
    if size == count:
        return x
    padded = x.new_zeros(size, x.shape[-1])
    padded[:count] = x.reshape(count, -1)
    return padded


def bucket(num_tokens: int) -> int:
    """Every number while tokens are decoded, when a row more would cost; wider steps as prompts get longer."""
    step = next((step for limit, step in BUCKETS if num_tokens <= limit), WIDEST)
    return -(-num_tokens // step) * step


def like_rows(out: Tensor, x: Tensor) -> Tensor:
    """The rows of `x` out of a bucket's."""
    count = x.numel() // x.shape[-1]
    return out if len(out) == len(x) and out.dim() == x.dim() else out[:count].view(*x.shape[:-1], out.shape[-1])


def joined_bias(layers: Sequence[nn.Linear]) -> Tensor | None:
    if all(layer.bias is None for layer in layers):
        return None
    biases = [layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias for layer in layers]
    return torch.cat(biases).detach()


def sibling_groups(model: Any) -> list[list[str]]:
    """Names of all linear layers that adapters can change, those of one input together."""
    names = list(linear_modules(model))
    present = set(names)
    groups: list[list[str]] = []
    taken: set[str] = set()
    for name in names:
        if name in taken:
            continue
        parent, _, own = name.rpartition(".")
        family = next((f for f in SIBLINGS if own in f), (own,))
        group = [f"{parent}.{member}" if parent else member for member in family]
        group = group if present.issuperset(group) else [name]
        groups.append(group)
        taken.update(group)
    return groups


class Projection(nn.Module):
    """One of a group's layers, where the model expects it."""

    def __init__(self, group: Any, index: int):
        super().__init__()
        self.group = group  # `lora.bank.LinearGroup`
        self._index = index
        self.in_features, self.out_features = group.in_features, group.out_features[index]

    def forward(self, x: Tensor) -> Tensor:
        return self.group.output(x, self._index)
