"""A model without its weights: its parameters and what a forward pass keeps for the backward, counted on torch's meta
device. Exact for every architecture and adapter, since the real modules run; nothing is computed and nothing is loaded.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ftray.config.adapter import AdapterConfig
from ftray.errors import UserError
from ftray.model.adapters.lora import inject_lora
from ftray.model.base import EMBEDDED, is_hub_id, prepare_base
from ftray.model.families import check_config
from ftray.model.flops import ModelFlops, count_flops
from ftray.model.packed import register_packed_attention
from ftray.model.packed_attention import packed_layout
from ftray.storage import read_json

SHAPES = Path(__file__).parent / "shapes"  # config.json of well-known models, as far as sizes go: ORG--NAME.json
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # a weight, its share of a block's constant, and of that constant's own
TOKENS = 251  # of the forward pass that is looked at, and twice as many; no size of a layer is one of these numbers


@dataclass(frozen=True)
class ModelSize:
    """Numbers of elements, and what a forward pass keeps for its backward in bytes."""

    frozen: int
    trained: int
    layer: int  # the largest decoder layer's
    quantized: int  # of the frozen ones, in 4 bits
    num_layers: int
    hidden: int
    vocabulary: int
    layer_bytes_per_token: float  # kept by one decoder layer
    layer_bytes: float  # kept by it whatever the number of tokens (DoRA's norms)
    outer_bytes_per_token: float  # kept by what is around the layers
    widest_bytes_per_token: float  # the widest activation of a layer
    flops: ModelFlops

    @property
    def total(self) -> int:
        return self.frozen + self.trained


def read_model_config(name: str) -> Any:
    """Its transformers config: of a directory, the embedded model, the hub's cache, a shipped shape, or the hub."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    from transformers import AutoConfig

    if name in EMBEDDED or Path(name).exists() or not is_hub_id(name):
        return AutoConfig.from_pretrained(prepare_base(name).directory, trust_remote_code=False)
    repository, _, revision = name.partition("@")
    cached = try_to_load_from_cache(repository, "config.json", revision=revision or None)
    if isinstance(cached, str):
        return AutoConfig.from_pretrained(Path(cached).parent, trust_remote_code=False)
    shape = SHAPES / f"{repository.replace('/', '--')}.json"
    if shape.is_file():
        settings = read_json(shape)
        return AutoConfig.for_model(settings.pop("model_type"), **settings)
    try:
        return AutoConfig.from_pretrained(
            Path(hf_hub_download(repository, "config.json", revision=revision or None)).parent,
            trust_remote_code=False,
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"base_model: {name}: its config.json is not to be had: {str(error).splitlines()[0]}") from None


def measure_model(config: Any, adapter: AdapterConfig | None, *, dtype: torch.dtype) -> ModelSize:
    """`config`: what `read_model_config` returned. Weights and activations are taken to be of `dtype`."""
    check_config(config.to_dict(), name=config.model_type)
    try:
        return count_model(config, adapter, dtype=dtype)
    except (AttributeError, IndexError, NotImplementedError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        kind = config.model_type
        raise UserError(f"base_model: a {kind} model cannot be counted without its weights: {reason}") from None


def count_model(config: Any, adapter: AdapterConfig | None, *, dtype: torch.dtype) -> ModelSize:
    whole = make_meta_model(config, adapter, dtype=dtype)
    layers = config.get_text_config().num_hidden_layers
    one, two = (make_meta_model(config, adapter, dtype=dtype, num_layers=n) for n in (1, 2))
    kept = {(n, tokens): kept_bytes(m, tokens) for n, m in ((1, one), (2, two)) for tokens in (TOKENS, 2 * TOKENS)}
    layer = [kept[2, tokens][0] - kept[1, tokens][0] for tokens in (TOKENS, 2 * TOKENS)]
    layer_per_token = (layer[1] - layer[0]) / TOKENS
    one_per_token = (kept[1, 2 * TOKENS][0] - kept[1, TOKENS][0]) / TOKENS
    widest = kept[1, 2 * TOKENS][1] - kept[1, TOKENS][1]
    parameters = dict(whole.named_parameters())
    trained = sum(p.numel() for p in parameters.values() if p.requires_grad)
    total = sum(p.numel() for p in parameters.values())
    quantized = 0
    if adapter is not None and adapter.quantize_base is not None:
        quantized = count_flops(whole).linear_parameters
    return ModelSize(
        frozen=total - trained,
        trained=trained,
        layer=max(sum(p.numel() for p in layer.parameters()) for layer in whole.get_decoder().layers),
        quantized=quantized,
        num_layers=layers,
        hidden=config.get_text_config().hidden_size,
        vocabulary=config.get_text_config().vocab_size,
        layer_bytes_per_token=layer_per_token,
        layer_bytes=layer[0] - layer_per_token * TOKENS,
        outer_bytes_per_token=one_per_token - layer_per_token,
        widest_bytes_per_token=widest / TOKENS,
        flops=count_flops(whole),
    )


def make_meta_model(
    config: Any, adapter: AdapterConfig | None, *, dtype: torch.dtype, num_layers: int | None = None
) -> Any:
    from transformers import AutoModelForCausalLM

    config = type(config)(**config.to_dict())
    text = config.get_text_config()
    if num_layers is not None:
        text.num_hidden_layers = num_layers
        if getattr(text, "layer_types", None):
            text.layer_types = (text.layer_types * num_layers)[:num_layers]
    with torch.device("meta"):
        attention = register_packed_attention()
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
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
        output = model.get_decoder()(
            input_ids=ids,
            position_ids=ids,
            attention_mask=ids.new_ones(1, 1, 1, 1),
            use_cache=False,
            layout=packed_layout([num_tokens]).to(torch.device("meta")),
            attend=[attend_on_meta] * len(model.get_decoder().layers),
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
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:2], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError


def attend_on_meta(query_HTD: Tensor, key_KTD: Tensor, value_KTD: Tensor, layout: Any, *, scaling: float) -> Tensor:
    """Like `packed_causal_attention`: the packed copies of query, key and value are what is kept. Returns [T, H, D]."""
    gathered = (x.index_select(1, layout.scatter_T) for x in (query_HTD, key_KTD, value_KTD))
    return FusedAttention.apply(*gathered).transpose(0, 1).index_select(0, layout.scatter_T)  # pyright: ignore


def frozen_bytes(size: ModelSize, *, bytes_per_weight: int) -> float:
    return size.quantized * NF4_BYTES + (size.frozen - size.quantized) * bytes_per_weight
