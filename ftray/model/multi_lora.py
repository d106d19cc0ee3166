"""Many LoRA adapters of mixed rank applied to one batch over one frozen base weight.

    y_t = W x_t + scale_a B_a A_a x_t        where a is the adapter of token t, or none

Tokens of one adapter lie in segments. Two ways to the same result, chosen by the size of the step:

- grouped: one pair of matmuls per segment. Right for prefill, where segments are long.
- stacked: the A of all adapters in the step as one matrix [R, in] with R the sum of ranks, a 0/1 mask [T, R] that
  keeps each token's own columns, and the stacked B [R, out]. Two matmuls whatever the number of adapters and however
  their ranks differ: right for decoding, where reading the weights is what costs. (Punica, Chen et al. 2023,
  arXiv 2310.18547, and S-LoRA, Sheng et al. 2023, arXiv 2311.03285, gather per token instead.)

Shapes: T tokens, R summed ranks. `bt` is B transposed with the scale folded in: [rank, out].
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ftray.errors import AdapterError
from ftray.model.adapter import Adapter

# From this many tokens a step is compute-bound, and multiplying by other adapters' columns would cost.
MAX_STACKED_TOKENS = 64


@dataclass(frozen=True)
class Segment:
    start: int
    end: int
    adapter: str


@dataclass(frozen=True)
class Factors:
    a: Tensor  # [rank, in]
    bt: Tensor  # [rank, out]


@dataclass(frozen=True)
class Stack:
    """One module's adapters on top of each other. `owners[i]` is the adapter of row i, as an index into the step's."""

    a: Tensor  # [R, in]
    bt: Tensor  # [R, out]
    owners: tuple[int, ...]


class LoraBatch:
    """Which adapter each token of one forward pass uses."""

    def __init__(self, segments: Sequence[Segment], num_tokens: int, stacks: dict[str, Stack] | None):
        self.segments = segments
        self.num_tokens = num_tokens
        self.stacks = stacks  # None: grouped
        self._adapters = sorted({segment.adapter for segment in segments})
        self._masks: dict[tuple[int, ...], Tensor] = {}

    def mask_TR(self, stack: Stack) -> Tensor:
        """Modules that the same adapters target with the same ranks share one mask."""
        mask = self._masks.get(stack.owners)
        if mask is None:
            owner_T = torch.full((self.num_tokens,), -1)
            for segment in self.segments:
                owner_T[segment.start : segment.end] = self._adapters.index(segment.adapter)
            owner_R = torch.tensor(stack.owners)
            mask = (owner_T[:, None] == owner_R[None, :]).to(stack.a)
            self._masks[stack.owners] = mask
        return mask


class LoraBank:
    """The resident adapters of a model, and the batch that its layers apply right now."""

    def __init__(self, model: Any):
        self.layers: dict[str, MultiLoraLinear] = {}
        self.batch: LoraBatch | None = None
        self._adapters: dict[str, dict[str, Factors]] = {}
        self._stacked_for: tuple[str, ...] = ()
        self._stacks: dict[str, Stack] = {}
        head = model.get_output_embeddings()
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and module is not head:
                layer = MultiLoraLinear(module, name, self)
                parent, _, attribute = name.rpartition(".")
                setattr(model.get_submodule(parent), attribute, layer)
                self.layers[name] = layer

    def __contains__(self, adapter: str) -> bool:
        return adapter in self._adapters

    def load(self, key: str, adapter: Adapter) -> None:
        """Raises `AdapterError` when a module is not in the model or its shape differs; then nothing has changed."""
        factors: dict[str, Factors] = {}
        for name, module in adapter.modules.items():
            layer = self.layers.get(name)
            if layer is None:
                raise AdapterError(
                    f"{key}: targets {name}, which the base model does not have; publish it for this base"
                )
            base = layer.base.weight
            want, have = (base.shape[1], base.shape[0]), (module.a.shape[1], module.b.shape[0])
            if want != have:
                raise AdapterError(
                    f"{key}: {name} maps {have[0]} to {have[1]}, the base model's maps {want[0]} to {want[1]}"
                )
            a = module.a.to(base.device, base.dtype).contiguous()
            bt = (module.b * module.scale).t().to(base.device, base.dtype).contiguous()
            factors[name] = Factors(a, bt)
        self._adapters[key] = factors

    def unload(self, key: str) -> None:
        del self._adapters[key]
        if key in self._stacked_for:
            self._stacked_for, self._stacks = (), {}

    @contextlib.contextmanager
    def apply(self, tokens: Sequence[tuple[str | None, int]]) -> Iterator[None]:
        """While it is open, the model's layers add adapters: `tokens` is [(adapter or None, number of tokens)]."""
        segments: list[Segment] = []
        start = 0
        for adapter, count in tokens:
            if adapter is not None and segments and segments[-1].end == start and segments[-1].adapter == adapter:
                segments[-1] = Segment(segments[-1].start, start + count, adapter)
            elif adapter is not None:
                segments.append(Segment(start, start + count, adapter))
            start += count
        if segments:
            adapters = tuple(sorted({segment.adapter for segment in segments}))
            stacked = start <= MAX_STACKED_TOKENS and len(segments) > 1
            self.batch = LoraBatch(segments, start, self._stacks_of(adapters) if stacked else None)
        try:
            yield
        finally:
            self.batch = None

    def factors(self, adapter: str, layer: str) -> Factors | None:
        return self._adapters[adapter].get(layer)

    def _stacks_of(self, adapters: tuple[str, ...]) -> dict[str, Stack]:
        """Kept until another set of adapters decodes: the set changes when a request comes or goes, not every step."""
        if adapters != self._stacked_for:
            self._stacks = {}
            for name in self.layers:
                found = [(i, f) for i, adapter in enumerate(adapters) if (f := self.factors(adapter, name)) is not None]
                if found:
                    owners = tuple(i for i, f in found for _ in range(f.a.shape[0]))
                    a, bt = torch.cat([f.a for _, f in found]), torch.cat([f.bt for _, f in found])
                    self._stacks[name] = Stack(a, bt, owners)
            self._stacked_for = adapters
        return self._stacks


class MultiLoraLinear(nn.Module):
    """A frozen linear layer that adds the update of each token's own adapter."""

    def __init__(self, base: nn.Linear, name: str, bank: LoraBank):
        super().__init__()
        self.base = base
        self.name = name
        self._bank = [bank]  # in a list, so that torch does not take it for a submodule to walk

    def forward(self, x: Tensor) -> Tensor:
        out = self.base(x)
        batch = self._bank[0].batch
        if batch is None:
            return out
        x_TI, out_TO = x.view(-1, x.shape[-1]), out.view(-1, out.shape[-1])
        if batch.stacks is None:
            self._add_grouped(x_TI, out_TO, batch)
        else:
            self._add_stacked(x_TI, out_TO, batch, batch.stacks)
        return out

    def _add_grouped(self, x_TI: Tensor, out_TO: Tensor, batch: LoraBatch) -> None:
        for segment in batch.segments:
            factors = self._bank[0].factors(segment.adapter, self.name)
            if factors is not None:
                part = slice(segment.start, segment.end)
                out_TO[part].addmm_(linear(x_TI[part], factors.a), factors.bt)

    def _add_stacked(self, x_TI: Tensor, out_TO: Tensor, batch: LoraBatch, stacks: dict[str, Stack]) -> None:
        stack = stacks.get(self.name)
        if stack is not None:
            out_TO.addmm_(linear(x_TI, stack.a).mul_(batch.mask_TR(stack)), stack.bt)
