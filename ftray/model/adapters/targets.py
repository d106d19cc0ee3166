"""Whether a base has what an adapter is to change, before anything is loaded."""

import re

from ftray.config.adapter import AdapterConfig
from ftray.errors import AdapterError
from ftray.model.base import BaseModel
from ftray.model.weight_files import weight_shapes


def check_targets(base: BaseModel, config: AdapterConfig) -> None:
    """By the names in the base's files. What is not among them may still be: transformers joins and renames some, so
    then the model itself is asked, without its weights. Raises `AdapterError`."""
    shapes = weight_shapes(base.directory)
    linear = [name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 2]
    targets = config.targets if isinstance(config.targets, list) else []
    if all(is_among(target, linear) for target in targets):
        return
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from ftray.model.adapters.lora import matching_modules

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base.directory))
    matching_modules(model, list(targets))


def is_among(target: str, names: list[str]) -> bool:
    try:
        pattern = re.compile(rf"(.*\.)?({target})")
    except re.error as error:
        raise AdapterError(f"adapter.targets: {target!r} is no regular expression: {error}") from None
    return any(pattern.fullmatch(name) for name in names)
