"""Architectures of transformers, as random twins: what each is, and what becomes of it. A new one is a line.

`python tests/parity/zoo.py` writes the table of docs/reference/bases.md.
"""

import sys
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "bases.md"
BEGIN, END = "<!-- the zoo -->", "<!-- end of the zoo -->"
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 1.0,
    "factor": 32.0,
    "original_max_position_embeddings": 4096,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
}
PLAIN: dict[str, Any] = {}
# Trained and served: by what of its layers is special, transformers' `model_type` and settings beside its defaults.
RIGHT: dict[str, dict[str, dict[str, Any]]] = {
    "full attention": dict.fromkeys(
        (
            *(
                "llama",
                "qwen2",
                "qwen3",
                "gemma",
                "phi",
                "phi3",
                "olmo",
                "olmo2",
                "smollm3",
                "glm",
                "glm4",
                "starcoder2",
            ),
            *("ernie4_5", "seed_oss", "apertus", "arcee", "bitnet", "helium", "nanochat"),
        ),
        PLAIN,
    ),
    "a window, or chunks": dict.fromkeys(
        ("mistral", "gemma3_text", "olmo3", "exaone4", "cwm", "afmoe", "llama4_text"), PLAIN
    ),
    "capped or scaled logits": dict.fromkeys(
        ("gemma2", "gemma3n_text", "cohere", "cohere2", "granite", "hyperclovax", "vaultgemma"), PLAIN
    ),
    "heads that differ by layer": {"gemma4_text": PLAIN},
    "attention sinks": {"gpt_oss": PLAIN},
    "a rotation by length": {
        "phi3 (longrope)": {"rope_parameters": LONGROPE, "hidden_size": 64, "num_attention_heads": 4},
        "ministral3": PLAIN,
    },
    "experts": dict.fromkeys(
        (
            *("qwen2_moe", "qwen3_moe", "mixtral", "olmoe", "granitemoe", "granitemoeshared", "phimoe", "minimax_m2"),
            *("ernie4_5_moe", "glm4_moe", "flex_olmo"),
        ),
        PLAIN,
    ),
    "latent attention": {
        "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
        **dict.fromkeys(("deepseek_v3", "minicpm3", "glm4_moe_lite", "youtu"), PLAIN),
    },
    "gated delta networks": dict.fromkeys(
        ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "olmo_hybrid", "kimi_linear"), PLAIN
    ),
    "short convolutions": {
        name: {"layer_types": ["conv", "conv", "full_attention"] * 4, "num_hidden_layers": 12}
        for name in ("lfm2", "lfm2_moe")
    },
    "Mamba": {
        "granitemoehybrid": {"layer_types": ["mamba", "mamba", "attention"] * 4, "num_hidden_layers": 12},
        "nemotron_h": {
            "layer_types": ["mamba", "moe", "mamba", "attention", "moe", "mlp"] * 2,
            "num_hidden_layers": 12,
        },
        "bamba": {"attn_layer_indices": [3, 9]},
        **dict.fromkeys(("falcon_h1", "jamba", "mamba", "mamba2", "falcon_mamba", "zamba2"), PLAIN),
    },
    "the old guard": dict.fromkeys(("gpt2", "gpt_neox", "opt", "persimmon", "biogpt", "gpt_bigcode"), PLAIN),
}
# Trained; refused by the engine: with what.
TRAINED = {"diffllama": "layer 0 attends more than once"}
# Refused: with what.
REFUSED = {
    "doge": "packed rows differ",  # a mask of its own, by values
    "mpt": "packed rows differ",  # positions as a bias of the scores
    "bloom": "packed rows do not go through it",  # the same
    "falcon": "packed rows differ",  # attention that cannot be replaced, as of the next
    "gptj": "packed rows differ",
    "codegen": "packed rows differ",
    "stablelm": "packed rows do not go through it",
    "recurrent_gemma": "packed rows do not go through it",  # states that only their module knows
    "minimax": "packed rows differ",  # the same
    "deepseek_v32": "uses indexed attention",
    "glm_moe_dsa": "uses indexed attention",
}
IN_VLLM: dict[str, str] = {}
ALL_RIGHT = {name: settings for group in RIGHT.values() for name, settings in group.items()}


def write_base(directory: Path, name: str) -> Any:
    """A `BaseModel` without weights: its config.json, and a tokenizer."""
    from tiny import make_tokenizer
    from transformers import AutoConfig

    from ftray.model.base import BaseModel

    AutoConfig.for_model(name.split()[0], **ALL_RIGHT.get(name, PLAIN)).save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return BaseModel(name, directory, "fingerprint")


def row(name: str, model: Any) -> str:
    """Of the page's table. `model`: the twin."""
    from ftray.config.adapter import AdapterConfig
    from ftray.model.adapters.experts import expert_modules
    from ftray.model.adapters.lora import target_modules
    from ftray.model.families.recurrent import recurrent_modules
    from ftray.model.packed import decoder_of

    targets = dict.fromkeys(ending(target) for target in target_modules(model, AdapterConfig()))
    experts = dict.fromkeys(matrix for own in expert_modules(model).values() for matrix in own)
    price = "a state for each sequence" if recurrent_modules(decoder_of(model)) else ""
    group = next(layers for layers, names in RIGHT.items() if name in names)
    cells = name, group, "yes", "yes", IN_VLLM.get(name, ""), ", ".join(targets), ", ".join(experts), price
    return f"| {' | '.join(cells)} |"


def ending(name: str) -> str:
    return name.rpartition(".")[2]


def rows_of_others() -> list[str]:
    trained = [f"| {name} | | yes | no: {why} | | | | |" for name, why in TRAINED.items()]
    return [*trained, *(f"| {name} | | no: {why} | no | | | | |" for name, why in REFUSED.items())]


def write_page() -> None:
    import tempfile

    from ftray.model.twin import twin_of

    head = (
        "| `model_type` | layers | trains | serves (torch) | vLLM's name | LoRA on all-linear | experts | price |",
        "|---|---|---|---|---|---|---|---|",
    )
    rows = []
    for name in ALL_RIGHT:
        with tempfile.TemporaryDirectory() as scratch:
            rows.append(row(name, twin_of(write_base(Path(scratch), name))))
    table = "\n".join([*head, *rows, *rows_of_others()])
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    write_page()
