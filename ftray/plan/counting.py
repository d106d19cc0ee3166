"""A model without its weights: its parameters and what a forward pass keeps for the backward, counted on torch's meta
device. Exact for every architecture and adapter, since the real modules run; nothing is computed and nothing is loaded.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.utils import logging

from ftray.config.adapter import AdapterConfig
from ftray.errors import UserError
from ftray.model.adapters.experts import num_expert_weights
from ftray.model.adapters.lora import inject_lora
from ftray.model.flops import count_flops
from ftray.model.packed import decoder_of, register_packed_attention
from ftray.model.packed_attention import packed_layout
from ftray.model.weights import on_meta
from ftray.plan.model_size import ModelSize

KINDS = ("layer_types", "mlp_layer_types")
TOKENS = 251  # of the forward pass that is looked at, and twice as many; no size of a layer is one of these numbers


def count_model(settings: dict[str, Any], adapter: AdapterConfig | None, *, dtype: str) -> ModelSize:
    """`settings`: of a config.json. Raises `UserError`."""
    logging.set_verbosity_error()  # of slow ways to compute what is not computed here
    try:
        rest = {key: value for key, value in settings.items() if key != "model_type"}
        config = AutoConfig.for_model(settings["model_type"], **rest)
        return count_modules(config, adapter, dtype=getattr(torch, dtype))
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        kind = settings.get("model_type")
        raise UserError(f"base_model: a {kind} model cannot be counted without its weights: {reason}") from None


def count_modules(config: Any, adapter: AdapterConfig | None, *, dtype: torch.dtype) -> ModelSize:
    whole = make_meta_model(config, adapter, dtype=dtype)
    layers = config.get_text_config().num_hidden_layers
    by_kind = [kept_by_layer(config, adapter, kind, dtype=dtype) for kind in kinds_of(config)]
    layer_per_token, layer_bytes, outer_per_token, widest = max(by_kind)  # the largest counts for all
    parameters = dict(whole.named_parameters())
    trained = sum(p.numel() for p in parameters.values() if p.requires_grad)
    total = sum(p.numel() for p in parameters.values())
    quantized = 0
    if adapter is not None and adapter.quantize_base is not None:
        quantized = count_flops(whole).linear_parameters
    return ModelSize(
        frozen=total - trained,
        trained=trained,
        layer=max(sum(p.numel() for p in layer.parameters()) for layer in decoder_of(whole).layers),
        quantized=quantized,
        num_layers=layers,
        hidden=config.get_text_config().hidden_size,
        vocabulary=config.get_text_config().vocab_size,
        layer_bytes_per_token=layer_per_token,
        layer_bytes=layer_bytes,
        outer_bytes_per_token=outer_per_token,
        widest_bytes_per_token=widest,
        flops=count_flops(whole),
    )


def kinds_of(config: Any) -> list[dict[str, str]]:
    """Of its layers, each once: what the config calls them."""
    text = config.get_text_config()
    named = {name: kinds for name in KINDS if (kinds := getattr(text, name, None))}
    kinds = [dict(zip(named, kind, strict=True)) for kind in dict.fromkeys(zip(*named.values(), strict=True))]
    return kinds or [{}]


def kept_by_layer(
    config: Any, adapter: AdapterConfig | None, kind: dict[str, str], *, dtype: torch.dtype
) -> tuple[float, float, float, float]:
    """What a layer of this kind keeps for its backward, in bytes: for a token, and once; what all around the layers
    keeps for a token; and the largest piece, for a token."""
    plain = adapter.model_copy(update={"experts": False}) if adapter is not None else None
    models = {n: make_meta_model(config, plain, dtype=dtype, num_layers=n, kind=kind) for n in (1, 2)}
    kept = {(n, tokens): kept_bytes(m, tokens) for n, m in models.items() for tokens in (TOKENS, 2 * TOKENS)}
    layer = [kept[2, tokens][0] - kept[1, tokens][0] for tokens in (TOKENS, 2 * TOKENS)]
    per_token = (layer[1] - layer[0]) / TOKENS
    one_per_token = (kept[1, 2 * TOKENS][0] - kept[1, TOKENS][0]) / TOKENS
    widest = (kept[1, 2 * TOKENS][1] - kept[1, TOKENS][1]) / TOKENS
    once = layer[0] - per_token * TOKENS
    if adapter is not None and adapter.experts:  # PEFT's W + B A of all of them (on meta it cannot be computed)
        once += dtype.itemsize * num_expert_weights(models[1])
    return per_token, once, one_per_token - per_token, widest


def make_meta_model(
    config: Any,
    adapter: AdapterConfig | None,
    *,
    dtype: torch.dtype,
    num_layers: int | None = None,
    kind: dict[str, str] | None = None,
) -> Any:
    """`num_layers`, `kind`: of so many layers, all of that kind."""
    config = type(config)(**config.to_dict())
    text = config.get_text_config()
    if num_layers is not None:
        text.num_hidden_layers = num_layers
        for name, value in (kind or {}).items():
            setattr(text, name, [value] * num_layers)
        if hasattr(text, "first_k_dense_replace"):
            text.first_k_dense_replace = 0
    attention = register_packed_attention()
    model: Any = on_meta(config, name=config.model_type, dtype=dtype, attn_implementation=attention)
    if adapter is not None:
        start: dict[str, Any] = {"init_from": None, "initialization": "default"}  # as large whatever its start
        if num_layers is not None:  # patterns of single layers may match none of these
            start |= {"targets": "all-linear"} if not isinstance(adapter.targets, str) else {}
            start["modules_to_save"] = [name for name in adapter.modules_to_save if "layers." not in name]
        inject_lora(model, adapter.model_copy(update=start), seed=0, on_meta=True)
    return model.train().to(dtype)


def kept_bytes(model: Any, num_tokens: int) -> tuple[int, int]:
    """(bytes that a forward pass through the decoder keeps for its backward, the largest piece of what grows)."""
    weights = {id_of(parameter) for parameter in model.parameters()}
    kept: dict[int, tuple[int, Tensor]] = {}

    def keep(tensor: Tensor) -> Tensor:
        if id_of(tensor) not in weights:
            kept[id_of(tensor)] = tensor.untyped_storage().nbytes(), tensor  # the tensor, so that its id stays its own
        return tensor

    ids = torch.zeros(1, num_tokens, dtype=torch.long, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = decoder_of(model)(
            input_ids=ids,
            position_ids=ids,
            attention_mask=ids.new_ones(1, 1, 1, 1),
            use_cache=False,
            layout=packed_layout([num_tokens]).to(torch.device("meta")),
            attend=[attend_on_meta] * len(decoder_of(model).layers),
        )
    del output
    activations = [size for size, tensor in kept.values() if num_tokens in tensor.shape]
    return sum(size for size, _ in kept.values()), max(activations)


def id_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class FusedAttention(torch.autograd.Function):
    """Keeps what flash attention keeps. (On the meta device torch would choose the kernel that keeps all scores.)"""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(*query.shape[:2], value.shape[-1])
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:2], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError


def attend_on_meta(query_HTD: Tensor, key_KTD: Tensor, value_KTD: Tensor, layout: Any, **_: Any) -> Tensor:
    """Like `packed_causal_attention`: the packed copies of query, key and value are what is kept. Returns [T, H, D]."""
    gathered = (x.index_select(1, layout.scatter_T) for x in (query_HTD, key_KTD, value_KTD))
    return FusedAttention.apply(*gathered).transpose(0, 1).index_select(0, layout.scatter_T)  # pyright: ignore
