"""LoRA on the experts of a mixture: three-dimensional parameters, by PEFT's `target_parameters`.

Shapes: E experts, r rank, I input and O output features of an expert. PEFT keeps A as [E r, I] and B as [O, r E].
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ftray.errors import AdapterError
from ftray.model.packed import decoder_of

EXPERTS = ".experts"  # how the names of their modules end
NESTED = ".base_layer"  # in PEFT's names: one more for each parameter of the same module that is wrapped after it
MATRICES = 3  # dimensions of a parameter that holds a matrix of each expert


def expert_modules(model: Any) -> dict[str, list[str]]:
    """Names of the modules that hold experts, with those of their parameters that are matrices, in PEFT's order."""
    decoder = decoder_of(model)
    inside = {module: own for module in decoder.modules() if (own := matrices(module))}
    return {name: inside[module] for name, module in model.named_modules() if module in inside}


def num_expert_weights(model: Any) -> int:
    """Of all their matrices, whole or sharded by ZeRO-3."""
    modules = ((model.get_submodule(name), own) for name, own in expert_modules(model).items())
    parameters = (getattr(module, matrix) for module, own in modules for matrix in own)
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters)


def matrices(module: nn.Module) -> list[str]:
    if isinstance(module, nn.Conv1d):
        return []
    return [name for name, parameter in module.named_parameters(recurse=False) if num_dimensions(parameter) == MATRICES]


def num_dimensions(parameter: Any) -> int:
    return len(getattr(parameter, "ds_shape", parameter.shape))  # whole or sharded by ZeRO-3


def target_parameters(model: Any) -> list[str]:
    """As adapter_config.json has them: with the last part of their module's name. Raises `AdapterError`."""
    modules = expert_modules(model)
    if not modules:
        raise AdapterError("adapter.experts: this base has no experts that LoRA can change; leave it out")
    return sorted({f"{name.rpartition('.')[2]}.{parameter}" for name, own in modules.items() for parameter in own})


def parameter_of(module: str, modules: Mapping[str, Sequence[str]], targets: Sequence[str]) -> str | None:
    """The parameter that PEFT's module name of an adapter's weights means. None: it means none."""
    plain = module.replace(NESTED, "")
    wrapped = [p for p in modules.get(plain, ()) if any(f".{plain}.{p}".endswith(f".{target}") for target in targets)]
    depth = module.count(NESTED)  # the last one that was wrapped is outermost
    return f"{plain}.{wrapped[-1 - depth]}" if depth < len(wrapped) else None


def is_transposed(module: nn.Module) -> bool:
    """Whether its matrices are [E, I, O], as transformers marks them; else [E, O, I]."""
    return bool(getattr(module, "is_transposed", False))


def expert_update(a: Tensor, bt: Tensor, num_experts: int) -> Tensor:
    """[E, O, I]: B A of each expert. `a`: [E r, I]; `bt`: [r E, O], with the scale."""
    a_ErI = a.unflatten(0, (num_experts, -1))
    b_ErO = bt.unflatten(0, (-1, num_experts)).transpose(0, 1)
    return b_ErO.transpose(1, 2) @ a_ErI
