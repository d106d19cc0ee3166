"""A base is used where its computation is shown right, not where nothing is known against it.

A twin of it is made at its first use: its own config with few layers that keep each kind, small widths and windows,
and random weights. Over packed rows the twin must give what transformers' own forward gives sequence by sequence. It
takes a second, reads no weights, and is remembered by the architecture and the versions of torch and transformers.
"""

import copy
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ftray.errors import UserError
from ftray.model.base import AS_IT_IS, BaseModel, fingerprint_of, load_tokenizer
from ftray.model.families import check_layers
from ftray.storage import read_json, write_json
from ftray.storage.cache import cache_directory

PROOFS = "proofs"  # in the cache
VERSION = 3  # of what is compared: another number compares anew
# In float32 right ones differ by some 1e-6, wrong ones by 2e-3 and more.
TOLERANCE = 2e-4
LENGTHS = (24, 9, 5)  # of sequences: on both sides of a window of 8
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


def check_packed(base: BaseModel) -> None:
    """Raises `UserError` where a packed row of its architecture is not shown right."""
    check_layers(base)
    refuse(base, remembered("packed", base, lambda: packed_problem(base)), what="training")


def refuse(base: BaseModel, problem: str | None, *, what: str) -> None:
    if problem is not None:
        kind = read_json(base.directory / "config.json").get("model_type")
        raise UserError(
            f"base_model: {base.name}: {what} of its architecture ({kind}) is not shown right: {problem}; ftray does "
            "not compute it yet: choose another base"
        )


def remembered(kind: str, base: BaseModel, find: Callable[[], str | None]) -> str | None:
    """What is wrong with it; None: nothing, which is looked for no more."""
    if is_remembered(kind, base):
        return None
    problem, path = find(), proof_file(kind, base)
    if problem is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"base_model": base.name})
    return problem


def is_remembered(kind: str, base: BaseModel) -> bool:
    """As right."""
    return proof_file(kind, base).is_file()


def proof_file(kind: str, base: BaseModel) -> Path:
    return cache_directory() / PROOFS / f"{kind}-{key_of(base)}.json"


def key_of(base: BaseModel) -> str:
    config = read_json(base.directory / "config.json")
    for name in (*NOT_OF_THE_TWIN, "_name_or_path"):
        config.pop(name, None)
    versions = [VERSION, version("torch"), version("transformers"), version("ftray")]
    return hashlib.sha256(json.dumps([config, versions], sort_keys=True).encode()).hexdigest()[:24]


def packed_problem(base: BaseModel) -> str | None:
    try:
        model = twin_of(base)
        alone = [log_probs(model, ids) for ids in sequences()]
    except Exception as error:  # noqa: BLE001  an architecture is code of others, made smaller than it was meant
        return f"no small twin of it can be made ({first_line(error)})"
    try:
        packed = packed_log_probs(model)
    except Exception as error:  # noqa: BLE001
        return f"packed rows do not go through it ({first_line(error)})"
    problem = difference(packed, alone, what="packed rows differ from transformers' own forward")
    return problem or adapter_problem(base)


def adapter_problem(base: BaseModel) -> str | None:
    """Of LoRA on all linear layers, by PEFT: packed rows against sequences alone, and their gradients."""
    from ftray.config.adapter import AdapterConfig
    from ftray.model.adapters.lora import inject_lora

    try:
        model = twin_of(base)
        inject_lora(model, AdapterConfig(rank=2, alpha=2), seed=0)
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        disturb(trained)
        alone = [log_probs(model, ids) for ids in sequences()]
        expected = gradients(alone, trained)
        packed = packed_log_probs(model)
        found = gradients(packed, trained)
    except Exception as error:  # noqa: BLE001
        return f"LoRA on all its linear layers does not go through it ({first_line(error)})"
    problem = difference(packed, alone, what="packed rows with LoRA differ from PEFT's layers")
    scale = max(gradient.abs().max() for gradient in expected)
    return problem or difference(
        [gradient / scale for gradient in found],
        [gradient / scale for gradient in expected],
        what="gradients of LoRA differ from PEFT's layers",
        unit="of the largest",
    )


def disturb(parameters: Mapping[str, Any]) -> None:
    """From the start of LoRA, whose B is zero."""
    import torch

    noise = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.copy_(torch.randn(parameter.shape, generator=noise) * SPREAD)


def gradients(log_probs: Sequence[Any], parameters: Mapping[str, Any]) -> list[Any]:
    """Of the sum of all log-probabilities."""
    import torch

    found = torch.autograd.grad(torch.cat(list(log_probs)).sum(), list(parameters.values()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters.values(), strict=True)]


def difference(
    found: Sequence[Any], expected: Sequence[Any], *, what: str, unit: str = "(log-probability of a token)"
) -> str | None:
    """`found`, `expected`: log-probabilities [N] of each sequence, or what else is measured in `unit`."""
    import torch

    largest = largest_difference(found, expected)
    finite = all(torch.isfinite(values).all() for values in expected)
    return None if finite and largest <= TOLERANCE else f"{what} by {largest:.1g} {unit}"


def largest_difference(found: Sequence[Any], expected: Sequence[Any]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))


def first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:120]}" if text else type(error).__name__


# -- the twin -----------------------------------------------------------------------------------------------------


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


def sequences() -> list[list[int]]:
    import torch

    chance = torch.Generator().manual_seed(1)
    return [torch.randint(1, SMALL["vocab_size"], (length,), generator=chance).tolist() for length in LENGTHS]


def log_probs(model: Any, ids: Sequence[int]) -> Any:
    """[N - 1], of each token but the first, by transformers' own forward."""
    import torch

    found = model(torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1)
    return found[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0]


def packed_log_probs(model: Any) -> list[Any]:
    """Of each sequence, out of one row."""
    import torch

    from ftray.model.packed import PackedCausalLM, PackedRow, register_packed_attention
    from ftray.model.packed_attention import packed_layout

    model.set_attn_implementation(register_packed_attention())
    ids = [token for one in sequences() for token in one]
    ends = torch.tensor(LENGTHS).cumsum(0).tolist()
    rows = [place for end, length in zip(ends, LENGTHS, strict=True) for place in range(end - length, end - 1)]
    targets = [length - 1 for length in LENGTHS]
    row = PackedRow(
        ids_T=torch.tensor(ids),
        positions_T=torch.cat([torch.arange(length) for length in LENGTHS]),
        rows_N=torch.tensor(rows),
        targets_N=torch.tensor([ids[place + 1] for place in rows]),
        weights_N=torch.ones(len(rows)),
        sequences_N=torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(targets)),
        layout=packed_layout(LENGTHS),
    )
    return list(PackedCausalLM(model)(row).split(targets))
