"""Many LoRA adapters of mixed rank applied to one batch over one frozen base weight.

    y_t = W x_t + scale_a B_a A_a x_t        where a is the adapter of token t, or none

Reading the factors is what decoding costs: each is read once, in place, for all of its tokens (`batch.py`).
Punica (Chen et al. 2023, arXiv 2310.18547) and S-LoRA (Sheng et al. 2023, arXiv 2311.03285) have GPU kernels for it.

Shapes: T tokens, I input and O summed output features.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from ftray.errors import AdapterError
from ftray.infer.torch_engine.cpu.frozen_linear import (
    JOINED,
    FrozenLinear,
    GatedKernel,
    Projection,
    sibling_groups,
    weight_of,
)
from ftray.infer.torch_engine.cpu.huge_pages import HugePages
from ftray.infer.torch_engine.cpu.kernels import Layers, RmsNorm, in_blocks, kernels_for
from ftray.infer.torch_engine.lora.batch import Span, StepRuns
from ftray.infer.torch_engine.lora.experts import AdaptedExperts, takes_chosen
from ftray.infer.torch_engine.lora.slots import AdapterSlots, Factors, HostAdapter, Segment
from ftray.model.adapters.experts import expert_modules, is_transposed, parameter_of
from ftray.model.adapters.weights import Adapter, LoraWeights, check_shapes


class LoraBank:
    """The adapters of a model, in memory and in slots, and the batch that its layers apply right now."""

    def __init__(self, model: Any, *, device_budget: int, rounded: bool = False):
        """`rounded`: every factor to bfloat16, also where that changes it."""
        any_weight = next(model.parameters())
        self._device, self._dtype = any_weight.device, any_weight.dtype
        self._rounded = rounded
        self.kernels = kernels_for(any_weight)
        self._no_runs = self._runs_of([])
        self.runs = self._last_runs = self._no_runs
        self._groups: dict[str, LinearGroup] = {}
        self._group_of: dict[str, tuple[LinearGroup, int]] = {}
        self._shapes: dict[str, tuple[int, int]] = {}
        memory = HugePages()
        for names in sibling_groups(model):
            layers = [model.get_submodule(name) for name in names]
            joined = names[-1].endswith(JOINED[-1])
            group = LinearGroup(names[0], layers, self, memory, joined=joined)
            self._groups[group.name] = group
            for index, name in enumerate(names):
                self._group_of[name] = group, index
                self._shapes[name] = group.in_features, group.out_features[index]
                parent, _, attribute = name.rpartition(".")
                setattr(model.get_submodule(parent), attribute, Projection(group, index))
        self._experts = {
            name: parameters
            for name, parameters in expert_modules(model).items()
            if takes_chosen(model.get_submodule(name))
        }
        for name, parameters in self._experts.items():
            AdaptedExperts(name, model.get_submodule(name), parameters, lambda: self.runs.spans)
        self._expert_shapes = {
            f"{name}.{parameter}": matrix_shape(model.get_submodule(name), parameter)
            for name, parameters in self._experts.items()
            for parameter in parameters
        }
        self.slots = AdapterSlots(budget_bytes=device_budget, device=self._device, giving_up=self._forget_runs)
        self.host: dict[str, HostAdapter] = {}

    def __contains__(self, adapter: str) -> bool:
        return adapter in self.host

    def prepare(self, key: str, adapter: Adapter) -> HostAdapter:
        """What `load` takes, made in any thread. Raises `AdapterError` when a module is not in the model or its shape
        differs, or when it could never have a slot."""
        experts = {
            name: parameter
            for name in adapter.modules
            if (parameter := parameter_of(name, self._experts, adapter.target_parameters)) is not None
        }
        plain = {name: module for name, module in adapter.modules.items() if name not in experts}
        check_shapes(plain, self._shapes, label=key)
        by_group: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}
        for name, module in plain.items():
            group, index = self._group_of[name]
            by_group.setdefault(group.name, {})[index] = module.a, (module.b * module.scale).t()
        factors = {name: self._factors(self._groups[name], found) for name, found in by_group.items()}
        factors |= {
            parameter: expert_factors(adapter.modules[name], self._expert_shapes[parameter], f"{key}: {name}")
            for name, parameter in experts.items()
        }
        if self._rounded or (self.kernels is not None and all_bfloat16(factors)):
            factors = {name: own.to(torch.bfloat16) for name, own in factors.items()}
        prepared = HostAdapter(key, factors)
        self.slots.check(prepared)
        return prepared

    def load(self, adapter: HostAdapter) -> None:
        self.slots.drop(adapter.key)  # of other weights under that key
        self.host[adapter.key] = adapter

    def unload(self, key: str) -> None:
        del self.host[key]
        self.slots.drop(key)

    def acquire(self, key: str) -> bool:
        """Pins the adapter on the device; False while there is no slot for it."""
        return self.slots.acquire(self.host[key])

    def release(self, key: str) -> None:
        self.slots.release(key)

    def _forget_runs(self) -> None:
        """They hold the memory of slabs."""
        self._last_runs = self._no_runs

    def is_on_device(self, key: str) -> bool:
        return key in self.slots

    def order(self, key: str | None) -> tuple[int, int]:
        """Tokens in this order make the fewest runs."""
        return (0, 0) if key is None else self.slots.place(key).order

    @contextlib.contextmanager
    def apply(self, tokens: Sequence[tuple[str | None, int]]) -> Iterator[None]:
        """While it is open, the model's layers add adapters: `tokens` is [(adapter or None, number of tokens)]. Every
        adapter must hold a slot (`acquire`)."""
        spans: list[Span] = []
        start = 0
        for key, count in tokens:
            if key is not None:
                place = self.slots.place(key)
                last = spans[-1] if spans else None
                if last is not None and last[0] is place and last[1] + last[2] == start:
                    spans[-1] = place, last[1], last[2] + count
                else:
                    spans.append((place, start, count))
            start += count
        if spans != self._last_runs.spans:  # mostly they are the last step's
            self._last_runs = self._runs_of(spans)
        self.runs = self._last_runs
        try:
            yield
        finally:
            self.runs = self._no_runs

    @contextlib.contextmanager
    def rows(self, start: int, count: int) -> Iterator[None]:
        """While it is open, the layers get `count` rows of the batch from `start` on."""
        whole = self.runs
        clipped = [
            (place, max(first, start) - start, min(first + num, start + count) - max(first, start))
            for place, first, num in whole.spans
        ]
        own = [span for span in clipped if span[2] > 0]
        if own != whole.spans:
            self.runs = self._runs_of(own) if own else self._no_runs
        try:
            yield
        finally:
            self.runs = whole

    def _runs_of(self, spans: Sequence[Span]) -> StepRuns:
        return StepRuns(spans, self._device, with_kernels=self.kernels is not None)

    def _factors(self, group: "LinearGroup", found: dict[int, tuple[Tensor, Tensor]]) -> Factors:
        def own(tensor: Tensor) -> Tensor:
            tensor = tensor.to(self._dtype).contiguous()
            return tensor.pin_memory() if self._device.type == "cuda" else tensor

        a = [found[index][0] for index in sorted(found)]
        bt: list[Tensor] = []
        segments: list[Segment] = []
        for output, members in enumerate(group.members):
            ranks = [len(found[index][0]) if index in found else 0 for index in members]
            block = torch.zeros(sum(ranks), sum(group.out_features[index] for index in members))
            row = column = 0
            for index, rank in zip(members, ranks, strict=True):
                width = group.out_features[index]
                if rank:
                    segments.append(Segment(output, row, rank, column, width))
                    block[row : row + rank, column : column + width] = found[index][1]
                row, column = row + rank, column + width
            bt.append(own(block if self.kernels is None else in_blocks(block)))
        return Factors(own(torch.cat(a)), tuple(bt), tuple(segments))


def matrix_shape(module: nn.Module, parameter: str) -> tuple[int, int, int]:
    """(experts, out, in)."""
    experts, first, second = getattr(module, parameter).shape
    return (experts, second, first) if is_transposed(module) else (experts, first, second)


def expert_factors(weights: LoraWeights, shape: tuple[int, int, int], label: str) -> Factors:
    """`shape`: experts, out, in. Raises `AdapterError`."""
    if (weights.a.shape[0], weights.b.shape[0], weights.a.shape[1]) != (shape[0] * weights.rank, *shape[1:]):
        raise AdapterError(f"{label}: is of experts of other shapes than this base's {list(shape)}")
    return Factors(weights.a.contiguous(), ((weights.b * weights.scale).t().contiguous(),), ())


def all_bfloat16(factors: Mapping[str, Factors]) -> bool:
    """Whether bfloat16 holds the same numbers in half the bytes, as of adapters that were trained or saved in it."""
    tensors = (tensor for own in factors.values() for tensor in own.tensors)
    return all(torch.equal(tensor.to(torch.bfloat16).to(tensor.dtype), tensor) for tensor in tensors)


class LinearGroup:
    """Frozen linear layers of one input, with the update of each token's own adapter added.

    Layers whose outputs are used side by side (q, k, v) are one multiplication; others have an output of their own.
    """

    def __init__(self, name: str, layers: Sequence[nn.Linear], bank: LoraBank, memory: HugePages, *, joined: bool):
        self.name = name
        shapes = [weight_of(layer).shape for layer in layers]
        self.in_features, self.out_features = shapes[0][1], [shape[0] for shape in shapes]
        self.members = [list(range(len(layers)))] if joined else [[index] for index in range(len(layers))]
        self._blocks = [FrozenLinear([layers[i] for i in own], bank.kernels, memory) for own in self.members]
        is_pair = bank.kernels is not None and len(self._blocks) == 2
        self._gated = GatedKernel(*self._blocks) if is_pair else None
        self._bank = bank
        self._following: LinearGroup | None = None
        self._input: Tensor | None = None
        self._outputs: list[Tensor] = []

    @property
    def layers(self) -> Layers:
        """With kernels: what computes all of them at once, if they are joined, a gated pair, or one."""
        return self._blocks[0].layers if self._gated is None else self._gated.layers

    def comes_before(self, following: "LinearGroup") -> None:
        """With kernels: what the model computes after this group is fetched meanwhile."""
        self._following = following
        self.layers.following = following.layers

    def output(self, x: Tensor, index: int) -> Tensor:
        """Of layer `index`. The model asks for one after the other with the same tensor: computed at the first."""
        if x is not self._input:
            outs = self._products(x)
            joined = len(outs) < len(self.out_features)
            self._input, self._outputs = x, list(outs[0].split(self.out_features, dim=-1)) if joined else outs
        out = self._outputs[index]
        if index == len(self._outputs) - 1:
            self._input, self._outputs = None, []
        return out

    def project(self, x_TI: Tensor, *, norm: RmsNorm | None = None, residual: Tensor | None = None) -> Tensor:
        """The joined outputs, [T, O], of norm(x); with `residual` added."""
        return self._products(x_TI, norm=norm, residual=residual)[0]

    def gated(self, x_TI: Tensor, *, norm: RmsNorm) -> Tensor:
        """silu(first) * second, of two layers of norm(x)."""
        if self._gated is not None:
            return self._gated(x_TI, norm=norm, adapters=self._bank.runs.adapters(self.name))
        gate, up = self._products(x_TI, norm=norm)
        return silu(gate, inplace=True).mul_(up)

    def _products(self, x: Tensor, *, norm: RmsNorm | None = None, residual: Tensor | None = None) -> list[Tensor]:
        """Of each multiplication, [..., O]."""
        if norm is not None and self._bank.kernels is None:
            x, norm = norm(x), None
        runs = self._bank.runs
        adapters = runs.adapters(self.name)
        following = runs.adapters(self._following.name) if self._following is not None else None
        outs = [
            block(x, norm=norm, residual=residual, adapters=adapters, output=number, next_adapters=following)
            for number, block in enumerate(self._blocks)
        ]
        if runs.matmuls:
            x_TI, outs_TO = x.reshape(-1, self.in_features).contiguous(), [o.view(-1, o.shape[-1]) for o in outs]
            for run in runs.matmuls:
                run.add_to(outs_TO, x_TI, self.name)
        return outs
