"""LoRA for training: injected into a base model through PEFT, and written as a plain PEFT directory.

Variants: LoRA (Hu et al. 2021, arXiv 2106.09685), rsLoRA (Kalajdzievski 2023, arXiv 2312.03732), DoRA (Liu et al.
2024, arXiv 2402.09353); PiSSA initialisation (Meng et al. 2024, arXiv 2404.02948).
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ftray.config.adapter import AdapterConfig, target_pattern
from ftray.errors import AdapterError
from ftray.model.adapters.directory import CONFIG_FILE, PREFIX, WEIGHTS_FILE, read_adapter_config
from ftray.model.adapters.experts import EXPERTS, NESTED, target_parameters
from ftray.model.adapters.linear import linear_modules
from ftray.model.adapters.tokens import trained_rows
from ftray.model.base import BaseModel, keep_template
from ftray.model.heads import CAUSAL_LM, Head
from ftray.storage import write_json, write_manifest

# PiSSA by a randomised SVD of 16 power iterations: near the exact one, at a fraction of its time.
INITIALIZATIONS: dict[str, Any] = {"default": True, "pissa": "pissa_niter_16"}
TIED = ("embed_tokens", "lm_head")


def inject_lora(
    model: Any,
    config: AdapterConfig,
    *,
    seed: int,
    head: Head = CAUSAL_LM,
    trained_ids: Sequence[int] = (),
    on_meta: bool = False,
) -> dict[str, Tensor] | None:
    """Freezes the base and adds trainable LoRA layers. Returns PiSSA's initial A and B, which it took out of the base
    weights, by parameter name; else None. `trained_ids`: of `adapter.train_tokens`. `on_meta`: the new layers have no
    values either."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it; on a CPU it tells of a missing kernel
    from peft import LoraConfig, TaskType, inject_adapter_in_model

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    ties = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    peft_config = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=config.dropout,
        target_modules=target_modules(model, config),
        target_parameters=target_parameters(model) if config.experts else None,
        trainable_token_indices=trained_rows(model, trained_ids) if trained_ids else None,
        rank_pattern=dict(config.rank_pattern),
        alpha_pattern=dict(config.alpha_pattern),
        use_rslora=config.variant == "rslora",
        use_dora=config.variant == "dora",
        init_lora_weights=INITIALIZATIONS[config.initialization],
        modules_to_save=[*config.modules_to_save, *head.saved_modules] or None,
        ensure_weight_tying=ties and any(name in TIED for name in config.modules_to_save),
        task_type=TaskType(head.task_type),
    )
    torch.manual_seed(seed)  # the same start on every rank and at every world size
    try:
        inject_adapter_in_model(peft_config, model, low_cpu_mem_usage=on_meta)
    except ValueError as error:
        raise AdapterError(f"adapter.targets: {config.targets!r}: {str(error).splitlines()[0]}") from None
    check_saved_modules(model, config)
    if config.initialization != "pissa":
        return None
    return {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters() if ".lora_" in name}


def target_modules(model: Any, config: AdapterConfig) -> list[str]:
    """Names of the linear layers that get LoRA. Raises `AdapterError`."""
    taken = taken_for_experts(model)
    if isinstance(config.targets, str):
        named = linear_modules(model).items()
        return [name for name, module in named if name.rpartition(".")[2] not in taken and not is_gate(module)]
    names = matching_modules(model, config.targets)
    for name in names:
        if name.rpartition(".")[2] in taken:
            raise AdapterError(
                f"adapter.targets: {name}: on a {model.config.model_type} PEFT takes that name for the experts'; name "
                "other layers, or set adapter.experts"
            )
    return names


def is_gate(module: Any) -> bool:
    """Of a shared expert: one number a token."""
    return getattr(module, "out_features", None) == 1


def taken_for_experts(model: Any) -> set[str]:
    """Names of linear layers, of shared experts and dense layers, that PEFT turns into parameters of the experts, since
    these were linear layers of the same names in transformers 4."""
    from peft.utils import transformers_weight_conversion as conversion

    pattern = conversion._MODEL_TO_CONVERSION_PATTERN.get(model.config.get_text_config().model_type, "")
    return {*conversion._MOE_TARGET_MODULE_MAPPING.get(pattern, ())}


def options_of(model: Any) -> dict[str, Any]:
    """What adapter_config.json says of the injected adapter beside its linear layers: experts, trained tokens."""
    injected = getattr(model, "peft_config", {}).get("default")
    parameters = getattr(injected, "target_parameters", None)
    tokens = getattr(injected, "trainable_token_indices", None)
    named = {"target_parameters": sorted(parameters or ()), "trainable_token_indices": tokens}
    return {key: value for key, value in named.items() if value}


def matching_modules(model: Any, targets: list[str]) -> list[str]:
    """Names of the linear modules whose name, or its ending after a dot, matches one of the regular expressions."""
    head = model.get_output_embeddings()
    linear = [*linear_modules(model), *(name for name, module in model.named_modules() if module is head)]
    found: set[str] = set()
    for target in targets:
        matched = set(filter(target_pattern(target).fullmatch, linear))
        if not matched:
            known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linear}))
            raise AdapterError(f"adapter.targets: {target!r} matches no linear module; the model has {known}")
        found |= matched
    return sorted(found)


def num_lora_parameters(model: Any, config: AdapterConfig) -> int:
    """Of the plain base's adapter; at most, where ranks differ by module: the largest counts for all."""
    linear: dict[str, Any] = linear_modules(model)
    rank = max([config.rank, *config.rank_pattern.values()])
    shapes = (linear[name].weight.shape for name in target_modules(model, config) if name in linear)
    return sum(rank * sum(shape) for shape in shapes)


def check_saved_modules(model: nn.Module, config: AdapterConfig) -> None:
    names = [name for name, _ in model.named_parameters()]
    for wanted in config.modules_to_save:
        if not any(f"{wanted}.modules_to_save." in name for name in names):
            tied = " (it shares its weight with embed_tokens: name that)" if wanted == "lm_head" else ""
            raise AdapterError(f"adapter.modules_to_save: {wanted!r} is no module of this model{tied}")


@contextlib.contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """While it is open the base model computes alone."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    layers = [module for module in model.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


# -- parameter names and PEFT's names on disk ---------------------------------------------------------------------


def adapter_key(parameter_name: str) -> str:
    """`model...lora_A.default.weight` -> `base_model.model.model...lora_A.weight`, as PEFT writes it."""
    name = parameter_name.replace(".lora_magnitude_vector.default.weight", ".lora_magnitude_vector")
    name = name.replace(".trainable_tokens_delta.default", ".trainable_tokens_delta")
    return PREFIX + name.replace(".modules_to_save.default.", ".").replace(".default.", ".")


def load_weights_from(directory: Path, model: nn.Module, config: AdapterConfig, *, label: str) -> None:
    """Goes on from an earlier adapter: its weights become the start. Raises `AdapterError` when it does not fit."""
    earlier = read_adapter_config(directory, label=label)
    wanted = {
        "r": config.rank,
        "lora_alpha": config.alpha,
        "alpha_pattern": dict(config.alpha_pattern),
        "use_dora": config.variant == "dora",
        "use_rslora": config.variant == "rslora",
        "target_parameters": [],
        "trainable_token_indices": {},
    } | options_of(model)
    for key, value in wanted.items():
        if (earlier.get(key) or type(value)()) != value:
            raise AdapterError(
                f"adapter.init_from: {label} has {key}={earlier.get(key)!r}, this run {value!r}; they must be the same"
            )
    saved = load_file(directory / WEIGHTS_FILE)
    trained = {adapter_key(name): p for name, p in model.named_parameters() if p.requires_grad}
    if differing := sorted(trained.keys() ^ saved.keys() - tied_copies(saved)):
        side = "lacks" if differing[0] in trained else "also has"
        raise AdapterError(f"adapter.init_from: {label} {side} {differing[0]}; use its targets and modules_to_save")
    with torch.no_grad():
        for key, parameter in trained.items():
            if saved[key].shape != parameter.shape:
                raise AdapterError(f"adapter.init_from: {label}: {key} is {tuple(saved[key].shape)} there")
            parameter.copy_(saved[key])


def tied_copies(saved: dict[str, Tensor]) -> set[str]:
    """The output head, where it is written once more beside the embedding that it is tied to."""
    head, embedding = f"{PREFIX}lm_head.weight", next((k for k in saved if k.endswith(".embed_tokens.weight")), None)
    return {head} if embedding is not None and head in saved and torch.equal(saved[head], saved[embedding]) else set()


# -- writing ------------------------------------------------------------------------------------------------------


def write_adapter(
    directory: Path,
    weights: dict[str, Tensor],
    config: AdapterConfig,
    base: BaseModel,
    *,
    metadata: dict,
    head: Head = CAUSAL_LM,
    initial: dict[str, Tensor] | None = None,
    ties_embeddings: bool = False,
    options: Mapping[str, Any] | None = None,
) -> None:
    """A PEFT directory with a manifest that names the base it belongs to. `weights` are by parameter name; `initial`
    is what `inject_lora` returned; `options` what
    `options_of` did."""
    directory.mkdir(parents=True, exist_ok=True)
    growth = 1
    if initial is not None:
        weights, growth = relative_to_base(weights, initial), 2
    tensors = {adapter_key(name): value.contiguous() for name, value in weights.items()}
    embeddings = [key for key in tensors if key.endswith(".embed_tokens.weight")] if ties_embeddings else []
    for key in embeddings:
        tensors[f"{PREFIX}lm_head.weight"] = tensors[key].clone()
    save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    described = describe(tensors, config, base, head, growth=growth, ties=bool(embeddings))
    write_json(directory / CONFIG_FILE, described | dict(options or {}))
    keep_template(base, directory)
    write_manifest(directory, metadata={**metadata, **base.described})


def relative_to_base(weights: dict[str, Tensor], initial: dict[str, Tensor]) -> dict[str, Tensor]:
    """PiSSA trains B A over W - s B0 A0. For the untouched W that is the update s [B, -B0] [A; A0], of twice the rank.

    (PEFT's `path_initial_model_for_weight_conversion` does the same.)
    """
    joined = {}
    for name, value in weights.items():
        if ".lora_A." in name:
            joined[name] = torch.cat([value, initial[name].to(value)], dim=0)
        elif ".lora_B." in name:
            joined[name] = torch.cat([value, -initial[name].to(value)], dim=1)
        else:
            joined[name] = value
    return joined


def describe(
    tensors: dict[str, Tensor], config: AdapterConfig, base: BaseModel, head: Head, *, growth: int, ties: bool
) -> dict[str, Any]:
    """adapter_config.json. With `growth` times the rank, alpha grows so that the scale stays."""
    names = {key.removeprefix(PREFIX).split(".lora_")[0] for key in tensors if ".lora_" in key}
    adapted = sorted(name for name in names if not name.replace(NESTED, "").endswith(EXPERTS))
    suffixes = sorted({name.rsplit(".", 1)[-1] for name in adapted})
    beside_others = any("language_model." in name for name in adapted)  # an image tower may have the same endings
    plain = not beside_others and (isinstance(config.targets, str) or set(config.targets) <= set(suffixes))
    alpha_growth = growth**0.5 if config.variant == "rslora" else growth
    return {
        "peft_type": "LORA",
        "task_type": head.task_type,
        "base_model_name_or_path": base.name,
        "r": config.rank * growth,
        "lora_alpha": config.alpha * alpha_growth,
        "lora_dropout": config.dropout,
        "target_modules": suffixes if plain else adapted,
        "rank_pattern": {key: rank * growth for key, rank in config.rank_pattern.items()},
        "alpha_pattern": {key: alpha * alpha_growth for key, alpha in config.alpha_pattern.items()},
        "modules_to_save": [*config.modules_to_save, *head.saved_modules] or None,
        "ensure_weight_tying": ties,
        "use_rslora": config.variant == "rslora",
        "use_dora": config.variant == "dora",
        "inference_mode": True,
        "bias": "none",
        "fan_in_fan_out": False,
    }
