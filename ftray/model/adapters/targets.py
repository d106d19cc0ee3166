"""Whether a base has what an adapter is to change, before anything is loaded."""

from ftray.config.adapter import AdapterConfig, target_pattern
from ftray.model.base import BaseModel
from ftray.model.weight_files import weight_shapes


def check_targets(base: BaseModel, config: AdapterConfig) -> None:
    """By the names in the base's files. What is not among them may still be: transformers joins and renames some, so
    then the model itself is asked, without its weights. Raises `AdapterError`."""
    shapes = weight_shapes(base.directory)
    linear = [name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 2]
    targets = config.targets if isinstance(config.targets, list) else []
    if all(any(map(target_pattern(target).fullmatch, linear)) for target in targets):
        return
    import torch
    from transformers import AutoConfig

    from ftray.model.adapters.lora import matching_modules
    from ftray.model.weights import class_of

    config_of_model = AutoConfig.from_pretrained(base.directory)
    with torch.device("meta"):
        model = class_of(config_of_model, name=base.name).from_config(config_of_model)
    matching_modules(model, list(targets))
