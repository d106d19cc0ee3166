"""A small twin of a base: its own config with few layers that keep each kind, small widths and windows, and random
weights. Made without reading the base's own."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ftray.model.base import AS_IT_IS, BaseModel, fingerprint_of, load_tokenizer

WINDOW = 8
SPREAD = 0.2  # of the weights: enough that what is left out shows
# Of a config.json: what makes a twin small.
SMALL = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "lru_width"), 64),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim"), 96),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(
        ("head_dim", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 16
    ),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 128),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token"), 2),
    "linear_num_key_heads": 2,
    **dict.fromkeys(("linear_num_value_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 16),
    **dict.fromkeys(("global_head_dim", "attention_head_dim"), 32),
    **dict.fromkeys(("attention_hidden_size", "mamba_d_ssm"), 128),
    **dict.fromkeys(("state_size", "ssm_state_size", "mamba_d_state"), 16),
    "moe_shared_expert_intermediate_size": 32,
    "qk_head_dim": 32,
    "rotary_dim": 8,
    "hidden_size_per_layer_input": 16,
    "max_position_embeddings": 512,
}
LENGTHS_OF_CONTEXT = ("original_max_position_embeddings", "floor_scale")  # to which an architecture looks
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
KINDS_OF_LAYERS = ("layer_types", "layers_block_type", "mlp_layer_types")
# Of layers with a state: their inner width is the first times the hidden size, and the second times the third.
STATES = (
    ("expand", "num_heads", "head_dim"),
    ("mamba_expand", "mamba_n_heads", "mamba_d_head"),
    ("mamba_expand", "n_mamba_heads", "mamba_headdim"),
)
SHARED = "num_kv_shared_layers"  # the last ones, which have the keys of layers before
INDICES = ("_indices", "_layer_ids", "_idxs")  # endings of lists that number layers
STATE_WIDTH = 16
MOST_LAYERS = 16  # in turn from the first on, before some are left out
NOT_OF_THE_TWIN = ("architectures", "auto_map", "dtype", "quantization_config", "torch_dtype", "transformers_version")


def twin_config(config: dict[str, Any], derived: Sequence[str] = ()) -> dict[str, Any]:
    """Of a text model's: the same architecture, smaller. `derived`: names in it that follow from the others."""
    layers, num_shared = twin_layers(config)
    twin = {name: smaller(name, value) for name, value in config.items() if name not in NOT_OF_THE_TWIN}
    for name in derived:
        del twin[name]
    whole = depth_of(config)
    for name, value in twin.items():
        if isinstance(value, (list, str)) and len(value) == whole and whole > 1 and not name.endswith(INDICES):
            kept = [value[index] for index in layers]
            twin[name] = "".join(kept) if isinstance(value, str) else kept
        elif name.endswith(INDICES) and isinstance(value, list):
            twin[name] = [layers.index(index) for index in value if index in layers]
        elif isinstance(value, dict) and value and all(str(key).isdigit() for key in value):  # by layer
            twin[name] = {layers.index(int(key)): own for key, own in value.items() if int(key) in layers}
    heads, kv_heads = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(kv_heads, int):
        twin["num_key_value_heads"] = max(1, SMALL["num_attention_heads"] * kv_heads // heads)
    for expansion, num_heads, width in STATES:
        if {expansion, num_heads, width} <= config.keys():
            twin |= {width: STATE_WIDTH, num_heads: twin[expansion] * SMALL["hidden_size"] // STATE_WIDTH}
    return twin | {name: len(layers) for name in DEPTHS if name in twin} | ({SHARED: num_shared} if num_shared else {})


def twin_layers(config: dict[str, Any]) -> tuple[list[int], int]:
    """The layers that a twin keeps, so that each kind is among them, at least two; how many of them share keys."""
    depth, num_shared = depth_of(config), config.get(SHARED) or 0
    by_layer = [config[name] for name in KINDS_OF_LAYERS if len(config.get(name) or ()) == depth]
    kinds = list(zip(*by_layer, strict=True)) if by_layer else [()] * depth
    own = kinds[: depth - num_shared]
    firsts = [own.index(kind) for kind in dict.fromkeys(own)]
    in_turn = list(range(min(len(own), max(2, max(firsts) + 1))))
    kept = in_turn if len(in_turn) <= MOST_LAYERS else firsts
    shared = [len(own) + kinds[len(own) :].index(kind) for kind in dict.fromkeys(kinds[len(own) :])]
    return kept + sorted(shared), len(shared)


def depth_of(config: dict[str, Any]) -> int:
    depths = [config[name] for name in DEPTHS if config.get(name)]
    return depths[0] if depths else len(config.get("layers_block_type") or (0, 1))


def smaller(name: str, value: Any) -> Any:
    """One value of a config."""
    is_number = isinstance(value, int) and not isinstance(value, bool)
    if is_number and name in SMALL:
        return SMALL[name]
    if is_number and value and ("window" in name or "chunk" in name or name in LENGTHS_OF_CONTEXT):
        return WINDOW
    if name.endswith("token_id"):
        return None if value is None else 0  # which is in no sequence
    if isinstance(value, dict):
        return {key: smaller(str(key), own) for key, own in value.items()}
    if isinstance(value, list) and name in SMALL:  # of each layer
        return [SMALL[name]] * len(value)
    return copy.deepcopy(value)


def twin_of(base: BaseModel) -> Any:
    """Of its text model, with transformers' eager attention, in float32 on the CPU."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    whole = AutoConfig.from_pretrained(base.directory).get_text_config()
    kinds, config = getattr(whole, "layer_types", None), whole.to_dict()
    derived = () if "layer_types" in config else ("layer_types",)
    made = type(whole).from_dict(twin_config({"layer_types": kinds} | config, derived))
    if {*(kinds or ())} != {*(getattr(made, "layer_types", None) or ())}:
        raise ValueError(f"it has not every kind of layer ({', '.join(sorted({*(kinds or ())}))})")
    model: Any = AutoModelForCausalLM.from_config(made, dtype=torch.float32, attn_implementation="eager").eval()
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=noise) * SPREAD)
            if "norm" in name and parameter.dim() == 1:
                parameter.add_(1.0)
    return model.requires_grad_(False)


def save_twin(base: BaseModel, model: Any, directory: Path) -> BaseModel:
    """As a base of its own, with the tokenizer of the whole."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    model.save_pretrained(directory)
    load_tokenizer(replace(base, chat=AS_IT_IS)).save_pretrained(directory)  # `chat` is set in it as in the whole's
    return BaseModel(f"a twin of {base.name}", directory, fingerprint_of(directory), base.chat)
