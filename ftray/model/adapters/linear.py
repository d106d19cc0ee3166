"""Which layers of a base LoRA can change."""

import inspect
import re
from typing import Any

from torch import nn

from ftray.model.families.recurrent import recurrent_modules
from ftray.model.packed import decoder_of


def linear_modules(model: Any) -> dict[str, nn.Module]:
    """All linear layers of the text model by name, the output head and routers of experts aside. Those too whose weight
    a recurrent module hands to a kernel itself: what is added to their output would be passed over without a word."""
    from transformers.pytorch_utils import Conv1D

    decoder, head = decoder_of(model), model.get_output_embeddings()
    handed = {child for module in recurrent_modules(decoder).values() for child in handed_to_kernels(module)}
    plain = {
        module
        for module in decoder.modules()
        if isinstance(module, Conv1D) or (isinstance(module, nn.Linear) and is_no_more(module))
    }
    return {name: module for name, module in model.named_modules() if module in plain - handed and module is not head}


def is_no_more(module: nn.Linear) -> bool:
    """Than a linear layer, whole or quantised; some routers of experts are."""
    return not type(module).__module__.startswith("transformers.models.")


def handed_to_kernels(module: nn.Module) -> list[nn.Module]:
    """Children of which its code reads the weight."""
    names = set(re.findall(r"self\.(\w+)\.weight", inspect.getsource(type(module))))
    return [child for name, child in module.named_children() if name in names]
