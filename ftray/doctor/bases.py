"""Whether a base model is trained and served right, and what LoRA reaches of it."""

import importlib.util
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ftray.doctor.checks import Finding, Level
from ftray.errors import UserError
from ftray.infer.engines import check_served
from ftray.model.base import BaseModel, context_limit, load_tokenizer, prepare_base
from ftray.model.proof import NotShownRightError, check_packed

# Kernels that transformers uses on a GPU where they are installed, and the layers that want them.
KERNELS = {"flash-linear-attention": "fla", "causal-conv1d": "causal_conv1d", "mamba-ssm": "mamba_ssm"}


def examine_base(name: str, *, log: Callable[[str], None]) -> list[Finding]:
    """Raises `UserError` where there is no such model."""
    if not Path("/dev/nvidia0").exists():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # deepspeed, which transformers imports, would look for others
    base = prepare_base(name, log=log)
    checks: dict[str, Callable[[BaseModel], None]] = {"training": check_packed, "serving": check_served}
    proofs = [proof(base, subject, check) for subject, check in checks.items()]
    return [*described(base), *proofs, *tokens(base)]


def proof(base: BaseModel, subject: str, check: Callable[[BaseModel], None]) -> Finding:
    began = time.perf_counter()
    try:
        check(base)
    except UserError as error:
        problem = error.problem if isinstance(error, NotShownRightError) else str(error)
        return Finding("failed", subject, problem, "choose another base: docs/reference/bases.md")
    text = "a small twin is computed as transformers and PEFT compute it"
    return Finding("ok", subject, f"{text} ({time.perf_counter() - began:.1f} s)")


def described(base: BaseModel) -> list[Finding]:
    """Its layers, and what LoRA on all linear layers changes."""
    from ftray.config.adapter import AdapterConfig
    from ftray.model.adapters.experts import expert_modules
    from ftray.model.adapters.lora import target_modules
    from ftray.model.families.recurrent import recurrent_modules
    from ftray.model.packed import decoder_of
    from ftray.model.weights import model_without_weights

    model: Any = model_without_weights(base)
    config, text = model.config, model.config.get_text_config()
    kinds = Counter(getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers)
    layers = ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in kinds.items())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    found = [Finding("ok", "base model", f"{base}: {config.model_type}, {parameters / 1e9:.2f}B parameters; {layers}")]
    endings = Counter(name.rpartition(".")[2] for name in target_modules(model, AdapterConfig()))
    found.append(Finding("ok", "all-linear", ", ".join(endings)))
    if experts := expert_modules(model):
        matrices = sorted({matrix for own in experts.values() for matrix in own})
        found.append(Finding("ok", "experts", f"frozen; with adapter.experts: true LoRA on {', '.join(matrices)}"))
    if recurrent_modules(decoder_of(model)):
        missing = [name for name, module in KERNELS.items() if importlib.util.find_spec(module) is None]
        level: Level = "warning" if missing else "ok"
        slow = f"recurrent layers run by their slow reference without {', '.join(missing)}"
        fix = f"on GPUs: pip install {' '.join(missing)}" if missing else ""
        found.append(Finding(level, "kernels", slow if missing else "for recurrent layers", fix))
    return found


def tokens(base: BaseModel) -> list[Finding]:
    from ftray.model.adapters.targets import embedding_rows
    from ftray.model.weight_files import weight_shapes

    tokenizer, rows, limit = load_tokenizer(base), embedding_rows(weight_shapes(base.directory)), context_limit(base)
    template = "a chat template" if tokenizer.chat_template else "no chat template (set chat.template)"
    found = [Finding("ok", "tokenizer", f"{len(tokenizer):,} tokens, {template}, a context of {limit or 'any'} tokens")]
    if rows is not None and len(tokenizer) > rows:
        text = f"{len(tokenizer) - rows} of its tokens have no row in the embedding, which has {rows:,}"
        found.append(Finding("warning", "embedding", text, "data that has one of them is refused: resize the base"))
    return found
