"""An architecture is used where a small twin of it is computed as transformers computes it, else refused.

Random configs of transformers' own classes, with their defaults: no weights are read.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from chat_templates import tokenizer_of
from tiny import make_tokenizer

from ftray.config.chat import ChatConfig
from ftray.errors import UserError
from ftray.infer.engines import check_served
from ftray.infer.torch_engine.engine import TorchEngine
from ftray.infer.torch_engine.proof import served_problem
from ftray.model import packed_attention, proof
from ftray.model.base import BaseModel
from ftray.model.proof import check_packed, packed_problem, twin_config

# Trained and served.
RIGHT = [
    *(
        "llama",
        "qwen2",
        "qwen3",
        "gemma",
        "phi",
        "phi3",
        "olmo2",
        "granite",
        "smollm3",
        "glm4",
        "glm4_moe",
        "starcoder2",
    ),
    *("qwen3_moe", "mixtral", "gpt_neox", "ernie4_5", "seed_oss"),
]
# Trained, and refused by the engine.
TRAINED = ["gpt2", "opt", "diffllama"]
WRONG = {
    "mistral": "packed rows differ",  # its window, made as small as the twin
    "cohere": "packed rows differ",  # scaled logits
    "recurrent_gemma": "packed rows differ",
    "mpt": "packed rows differ",
    "doge": "packed rows differ",
    "falcon": "packed rows differ",
    "jamba": "packed rows do not go through it",
    "bamba": "",
    "falcon_h1": "",
    "mamba2": "",
    "gemma3_text": "packed rows do not go through it",
    "gpt_oss": "packed rows do not go through it",
    "qwen3_next": "packed rows do not go through it",
}


@pytest.fixture
def base_of(tmp_path):
    def make(name: str, **settings) -> BaseModel:
        from transformers import AutoConfig

        AutoConfig.for_model(name, **settings).save_pretrained(tmp_path)
        make_tokenizer().save_pretrained(tmp_path)
        return BaseModel(name, tmp_path, "fingerprint")

    return make


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_is_shown_right(name, base_of):
    base = base_of(name)
    assert packed_problem(base) is None
    assert served_problem(base) is None


def test_a_window_is_what_mistral_fails_by(base_of):
    base = base_of("mistral", sliding_window=None)
    assert packed_problem(base) is None
    assert served_problem(base) is None


@pytest.mark.parametrize("name", TRAINED)
def test_what_is_trained_alone_is_not_served(name, base_of):
    base = base_of(name)
    assert packed_problem(base) is None
    assert served_problem(base) is not None


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_refused_with_what_differs(name, base_of):
    base = base_of(name)
    problem = packed_problem(base)
    assert problem is not None
    assert WRONG[name] in problem
    assert served_problem(base) is not None


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 1.0,
    "factor": 32.0,
    "original_max_position_embeddings": 4096,
}


def test_a_rotary_scaling_that_looks_at_the_longest_of_a_row_is_found(base_of):
    """Its factors change at a length: one long neighbour would change them for a short sequence."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    base = base_of("phi3", rope_parameters=LONGROPE | factors, hidden_size=64, num_attention_heads=4)
    assert "packed rows differ" in (packed_problem(base) or "")


def test_neighbours_that_see_each_other_are_found(base_of, monkeypatch):
    """The twin of it all: an attention that takes a row for one sequence."""
    whole = packed_attention.packed_causal_attention

    def leaking(query, key, value, layout, *, scaling):
        one = packed_attention.packed_layout([sum(layout.lengths)])
        return whole(query, key, value, one, scaling=scaling)

    monkeypatch.setattr(packed_attention, "packed_causal_attention", leaking)
    assert "packed rows differ" in (packed_problem(base_of("llama")) or "")


def test_an_engine_that_forgets_where_tokens_stand_is_found(base_of, monkeypatch):
    whole = TorchEngine._hidden

    def lost(engine, ids_T, positions_T, counts, step):
        return whole(engine, ids_T, positions_T * 0, counts, step)

    monkeypatch.setattr(TorchEngine, "_hidden", lost)
    assert "answers differ" in (served_problem(base_of("llama")) or "")


def test_a_twin_renders_as_its_base(base_of):
    """A dated template, with its date: set once, not twice."""
    base = base_of("llama")
    tokenizer_of("gptoss").save_pretrained(base.directory)
    dated = replace(base, chat=ChatConfig(date="2026-01-02"))
    assert served_problem(dated) is None


def test_a_twin_keeps_every_kind_of_layer():
    kinds = ["full_attention"] + ["sliding_attention"] * 3
    config = {"model_type": "x", "num_hidden_layers": 32, "layer_types": kinds * 8, "sliding_window": 4096}
    twin = twin_config(config | {"num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096})
    assert twin["layer_types"] == ["full_attention", "sliding_attention"]
    assert (twin["num_hidden_layers"], twin["sliding_window"], twin["num_key_value_heads"]) == (2, 8, 1)


def test_a_proof_is_remembered_by_architecture_and_versions(base_of, monkeypatch, tmp_path):
    monkeypatch.setattr(proof, "cache_directory", lambda: tmp_path / "cache")
    base = base_of("llama")
    check_packed(base)
    check_served(base)
    kept = sorted(path.name.split("-")[0] for path in (tmp_path / "cache" / "proofs").iterdir())
    assert kept == ["packed", "torch_engine"]
    monkeypatch.setattr(proof, "packed_problem", lambda base: pytest.fail("it was remembered"))
    check_packed(base)
    check_packed(replace(base, name="the same elsewhere", fingerprint="of other weights"))
    wrong = base_of("mpt")
    monkeypatch.undo()
    monkeypatch.setattr(proof, "cache_directory", lambda: tmp_path / "cache")
    for _ in range(2):  # what is wrong is looked at again: the next version may have it
        with pytest.raises(UserError, match=r"training of its architecture \(mpt\) is not shown right: packed"):
            check_packed(wrong)


def test_numbers_that_are_none_are_no_proof():
    nan = [torch.tensor([float("nan")])]
    assert proof.difference(nan, nan, what="rows differ") is not None


def test_the_page_names_them_all():
    page = (Path(__file__).parents[2] / "docs/reference/bases.md").read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if line.startswith("| ernie4_5"))
    named = [cell.strip().split(", ") for cell in row.strip("|").split("|")]
    assert named == [sorted(RIGHT), sorted(TRAINED), sorted(WRONG)]
