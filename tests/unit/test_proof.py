"""How the proof of an architecture is made, remembered and told. tests/parity/test_zoo.py has the architectures."""

from dataclasses import replace

import pytest
import torch
from chat_templates import tokenizer_of
from tiny import make_tokenizer

from ftray.config.chat import ChatConfig
from ftray.errors import UserError
from ftray.infer.engines import check_served
from ftray.infer.torch_engine.proof import served_problem
from ftray.infer.torch_engine.text_model import TextModel
from ftray.model import packed_attention, proof
from ftray.model.base import BaseModel
from ftray.model.proof import check_packed, packed_problem
from ftray.model.twin import twin_config


@pytest.fixture
def base_of(tmp_path):
    def make(name: str, **settings) -> BaseModel:
        from transformers import AutoConfig

        AutoConfig.for_model(name, **settings).save_pretrained(tmp_path)
        make_tokenizer().save_pretrained(tmp_path)
        return BaseModel(name, tmp_path, "fingerprint")

    return make


def test_neighbours_that_see_each_other_are_found(base_of, monkeypatch):
    """The twin of it all: an attention that takes a row for one sequence."""
    whole = packed_attention.packed_causal_attention

    def leaking(query, key, value, layout, **scores):
        one = packed_attention.packed_layout([sum(layout.lengths)])
        return whole(query, key, value, one, **scores)

    monkeypatch.setattr(packed_attention, "packed_causal_attention", leaking)
    assert "packed rows differ" in (packed_problem(base_of("llama")) or "")


def test_an_engine_that_forgets_where_tokens_stand_is_found(base_of, monkeypatch):
    whole = TextModel.hidden

    def lost(engine, ids_T, positions_T, counts, step):
        return whole(engine, ids_T, positions_T * 0, counts, step)

    monkeypatch.setattr(TextModel, "hidden", lost)
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
