"""Many LoRA adapters trained at once over one frozen base: each has its own span of the tokens of a row.

    y_t = W x_t + b + scale_a B_a A_a x_t        where a is the adapter that token t trains

The base's matmul, its activations and its backward are shared by all; tokens of different adapters never meet, so that
each gets the gradient that it would get alone. (PLoRA, Yan et al. 2025, arXiv 2508.02932, and LoRAFusion, Zhu et al.
2025, arXiv 2510.00206, have GPU kernels for it.)

Shapes: T tokens, I input and O output features, R rank.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ftray.config.adapter import AdapterConfig
from ftray.errors import AdapterError
from ftray.model.adapters.lora import inject_lora

Span = tuple[str, int]  # an adapter and its number of tokens


class FusedLora:
    """The adapters of a model, and whose tokens the next row has."""

    def __init__(self, model: Any):
        self._model = model
        self._layers: dict[str, FusedLinear] = {}
        self.adapters: dict[str, dict[str, nn.Parameter]] = {}  # by adapter: parameters by PEFT's own name
        self.spans: list[Span] = []
        for parameter in model.parameters():
            parameter.requires_grad_(False)

    def add(self, name: str, config: AdapterConfig, *, seed: int) -> dict[str, nn.Parameter]:
        """A new adapter, with the start that a run of its own would give it. Returns its parameters by name."""
        refuse_unfusable(config)
        injected = inject_beside(self._model, config, seed=seed)
        head = self._model.get_output_embeddings()
        if any(layer.get_base_layer() is head for layer in injected.values()):
            raise AdapterError("adapter.targets: the output head sees trained tokens only, and cannot be fused")
        for module_name, layer in injected.items():
            fused = self._layers.get(module_name)
            if fused is None:
                fused = self._layers[module_name] = FusedLinear(layer.get_base_layer(), self)
            fused.take(name, layer)
            put(self._model, module_name, fused)
        parameters = {
            f"{module_name}.lora_{side}.default.weight": getattr(self._layers[module_name], side.lower())[name]
            for module_name in injected
            for side in ("A", "B")
        }
        self.adapters[name] = parameters
        return parameters

    def remove(self, name: str) -> None:
        """Its memory goes; the others stay as they are."""
        del self.adapters[name]
        for layer in self._layers.values():
            layer.drop(name)

    @contextlib.contextmanager
    def apply(self, spans: Sequence[Span]) -> Iterator[None]:
        """For the forward of one row: whose its tokens are, in order; and for its backward, where activations are
        computed again."""
        self.spans = list(spans)
        try:
            yield
        finally:
            self.spans = []

    @contextlib.contextmanager
    def rows(self, first: int, count: int) -> Iterator[None]:
        """While it is open, layers get so many of the row's tokens."""
        whole, start = self.spans, 0
        self.spans = []
        for name, own in whole:
            overlap = min(start + own, first + count) - max(start, first)
            if overlap > 0:
                self.spans.append((name, overlap))
            start += own
        try:
            yield
        finally:
            self.spans = whole


def refuse_unfusable(config: AdapterConfig) -> None:
    """What is not the plain sum above, or changes the base that all share. Raises `AdapterError`."""
    for key, plain in (("variant", ("lora", "rslora")), ("initialization", ("default",)), ("quantize_base", (None,))):
        if getattr(config, key) not in plain:
            raise AdapterError(f"adapter.{key}: {getattr(config, key)} cannot be trained beside other adapters")
    if config.modules_to_save:
        raise AdapterError("adapter.modules_to_save: whole modules cannot be trained beside other adapters")
    if config.dropout:
        raise AdapterError("adapter.dropout: its noise would depend on the company; set it to 0")


def inject_beside(model: Any, config: AdapterConfig, *, seed: int) -> dict[str, Any]:
    """PEFT's own layers by module name, with their start, injected into the plain base and taken out again."""
    from peft.tuners.lora import Linear

    with without_fused(model):
        inject_lora(model, config, seed=seed)
        injected = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
        for name, layer in injected.items():
            put(model, name, layer.get_base_layer())
    with contextlib.suppress(AttributeError):  # what PEFT leaves on the model
        del model.peft_config
    return injected


@contextlib.contextmanager
def without_fused(model: Any) -> Iterator[None]:
    """While it is open the base's own linear layers stand in their places."""
    fused = {name: module for name, module in model.named_modules() if isinstance(module, FusedLinear)}
    for name, module in fused.items():
        put(model, name, module.base)
    try:
        yield
    finally:
        for name, module in fused.items():
            put(model, name, module)


def put(model: Any, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    module._forward_hooks.update(model.get_submodule(name)._forward_hooks)  # what follows a layer stays with its place
    setattr(model.get_submodule(parent), attribute, module)


class FusedLinear(nn.Module):
    """A frozen linear layer with the adapters that target it."""

    def __init__(self, base: nn.Linear, group: FusedLora):
        super().__init__()
        self.base = base
        self._group = group
        self.a: dict[str, nn.Parameter] = {}  # [R, I]
        self.b: dict[str, nn.Parameter] = {}  # [O, R]
        self.scale: dict[str, float] = {}

    def take(self, name: str, layer: Any) -> None:
        """PEFT's adapter `default` of this layer, in float32 whatever the base has: small updates would be lost in
        bfloat16."""
        self.a[name] = nn.Parameter(layer.lora_A["default"].weight.detach().float())
        self.b[name] = nn.Parameter(layer.lora_B["default"].weight.detach().float())
        self.scale[name] = layer.scaling["default"]

    def drop(self, name: str) -> None:
        for values in (self.a, self.b, self.scale):
            values.pop(name, None)

    def forward(self, x: Tensor) -> Tensor:
        spans: list[tuple[int, int, float]] = []
        factors: list[Tensor] = []
        start = 0
        for name, count in self._group.spans:
            if name in self.a:
                spans.append((start, start + count, self.scale[name]))
                factors += [self.a[name], self.b[name]]
            start += count
        x_TI = x.reshape(-1, x.shape[-1])
        assert start in (0, len(x_TI)), f"{start} tokens are spoken for, the layer sees {len(x_TI)}"
        out_TO = FusedLinearFunction.apply(x_TI, self.base.weight, self.base.bias, spans, *factors)
        return out_TO.view(*x.shape[:-1], -1)  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]


class FusedLinearFunction(torch.autograd.Function):
    """One node for the base and all adapters: the update is added in place, and x is kept once."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        spans: Sequence[tuple[int, int, float]],
        *factors: Tensor,
    ) -> Tensor:
        out_TO = torch.nn.functional.linear(x_TI, weight, bias)
        reduced: list[Tensor] = []
        for index, (start, end, scale) in enumerate(spans):
            a, b = (factor.to(x_TI.dtype) for factor in factors[2 * index : 2 * index + 2])
            reduced_tR = x_TI[start:end] @ a.t()
            out_TO[start:end].addmm_(reduced_tR, b.t(), alpha=scale)
            reduced.append(reduced_tR)
        ctx.spans = spans
        ctx.save_for_backward(x_TI, weight, *factors, *reduced)
        return out_TO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_TO,) = grads
        x_TI, weight, *rest = ctx.saved_tensors
        count = len(ctx.spans)
        factors, reduced = rest[: 2 * count], rest[2 * count :]
        grad_x_TI = grad_TO @ weight if ctx.needs_input_grad[0] else None
        grad_factors: list[Tensor] = []
        for index, (start, end, scale) in enumerate(ctx.spans):
            a, b = factors[2 * index], factors[2 * index + 1]
            grad_tO = grad_TO[start:end]
            grad_tR = (grad_tO @ b.to(grad_tO.dtype)).mul_(scale)
            grad_factors.append((grad_tR.t() @ x_TI[start:end]).to(a.dtype))
            grad_factors.append((grad_tO.t() @ reduced[index]).mul_(scale).to(b.dtype))
            if grad_x_TI is not None:
                grad_x_TI[start:end].addmm_(grad_tR, a.to(grad_tO.dtype))
        return grad_x_TI, None, None, None, *grad_factors
