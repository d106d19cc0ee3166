"""A base model's weights on the device, in its dtype or in 4 bits."""

import importlib.util
from typing import Any

from ftray.errors import UserError
from ftray.model.base import BaseModel
from ftray.model.families import check_layers
from ftray.model.hardware import Hardware
from ftray.model.weight_precision import WHOLE, check_precision, precision_of
from ftray.storage import read_json

NF4_BLOCK = 64  # weights that share one quantisation constant


def load_weights(base: BaseModel, hardware: Hardware, *, attention: str, quantize: str | None = None) -> Any:
    """The causal LM on the chosen device. Weights are cloned out of the file mapping, which a busy machine evicts.

    `quantize="nf4"`: linear layers in 4 bits, with quantised constants (Dettmers et al. 2023, arXiv 2305.14314).
    """
    check_layers(base)
    check_precision(base, quantize=quantize)
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    options: dict[str, Any] = whole_weights(base)
    if quantize is not None:
        options = {"quantization_config": nf4_settings(hardware), "device_map": {"": hardware.device}}
    model: Any = model_class(base).from_pretrained(
        base.directory,
        dtype=hardware.dtype,
        attn_implementation=attention,
        trust_remote_code=False,
        **options,
    )
    if quantize is not None:
        check_nf4_rows(model, hardware)
    else:
        forget_quantisation(model)
    sharded = is_sharded(model)
    if hardware.device.type == "cpu" and not sharded:
        with torch.no_grad():
            for parameter in model.parameters():  # a tied weight is one parameter and comes once
                parameter.data = parameter.data.clone()
    return model if sharded or quantize is not None else model.to(hardware.device)


def whole_weights(base: BaseModel) -> dict[str, Any]:
    """What has transformers multiply its quantised weights out while it loads them."""
    method = precision_of(base)
    if method is None:
        return {}
    import transformers

    settings = dict(read_json(base.directory / "config.json")["quantization_config"])
    del settings["quant_method"]
    return {"quantization_config": getattr(transformers, WHOLE[method])(**settings | {"dequantize": True})}


def forget_quantisation(model: Any) -> None:
    """Of what its whole weights were made of: it would be saved as quantised."""
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False


def model_class(base: BaseModel) -> Any:
    """Raises `UserError`."""
    from transformers import AutoConfig

    return class_of(AutoConfig.from_pretrained(base.directory), name=base.name)


def class_of(config: Any, *, name: str) -> Any:
    """transformers' class for it: the causal LM; of an image model that has none the whole, whose text model is used.
    Raises `UserError`."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    for made in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in made._model_mapping:
            return made
    raise UserError(f"base_model: {name}: a {config.model_type} is no language model; choose another base")


def model_without_weights(base: BaseModel) -> Any:
    """On torch's meta device, whatever its files are quantised by. Raises `UserError`."""
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(base.directory)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return on_meta(config, name=base.name)


def on_meta(config: Any, *, name: str, **settings: Any) -> Any:
    import torch

    with torch.device("meta"):
        return class_of(config, name=name).from_config(config, **settings)


def is_sharded(model: Any) -> bool:
    """By ZeRO-3."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def check_nf4_rows(model: Any, hardware: Hardware) -> None:
    """bitsandbytes 0.50.2 on CPU reads the wrong constants where a weight's row is no whole number of blocks: 28%
    error instead of 9%. On a GPU it does not."""
    from bitsandbytes.nn import Linear4bit

    for name, module in model.named_modules():
        if isinstance(module, Linear4bit) and module.in_features % NF4_BLOCK and hardware.device.type == "cpu":
            raise UserError(
                f"adapter.quantize_base: {name} has rows of {module.in_features} weights, which is no multiple of "
                f"{NF4_BLOCK}; on a CPU bitsandbytes computes them wrongly: train this base on a GPU, or unquantised"
            )


def nf4_settings(hardware: Hardware) -> Any:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("adapter.quantize_base: nf4 needs bitsandbytes: pip install 'ftray[quantized]'")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=hardware.dtype,
    )
