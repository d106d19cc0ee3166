"""The zoo: a random twin of each architecture, trained (packed, LoRA and its gradients) and served (in chunks, beside
others, out of shared and lost pages, with an adapter), is what transformers and PEFT compute; or it is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import zoo
from zoo import ALL_RIGHT, REFUSED, TRAINED, write_base

from ftray.errors import UserError
from ftray.infer.torch_engine import attention, proof, states, text_model
from ftray.infer.torch_engine.engine import TorchEngine
from ftray.infer.torch_engine.proof import served_problem
from ftray.model import packed, packed_attention
from ftray.model.families import SlidingAttention, rotary
from ftray.model.families.recurrent import PackedStates
from ftray.model.packed_attention import packed_layout
from ftray.model.proof import adapter_problem, check_packed, packed_problem


@pytest.fixture(autouse=True)
def _one_thread():
    """Matrices of these sizes are slower on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ALL_RIGHT)
def test_trained_and_served_as_transformers_computes_it(name, tmp_path):
    base = write_base(tmp_path, name)
    assert packed_problem(base) is None
    assert served_problem(base) is None


@pytest.mark.parametrize("name", TRAINED)
def test_trained_and_not_served(name, tmp_path):
    base = write_base(tmp_path, name)
    assert packed_problem(base) is None
    assert TRAINED[name] in (served_problem(base) or "")


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_what_differs(name, tmp_path):
    base = write_base(tmp_path, name)
    with pytest.raises(UserError, match=REFUSED[name]):
        check_packed(base)
    assert served_problem(base) is not None


def test_the_page_has_the_table_of_the_zoo():
    page = zoo.PAGE.read_text(encoding="utf-8")
    assert zoo.table() in page, "python tests/parity/zoo.py writes it"
    assert str(len(ALL_RIGHT)) in page


# -- the twins: what each part is for ------------------------------------------------------------------------------


def test_a_forgotten_window_is_found(tmp_path, monkeypatch):
    base = write_base(tmp_path, "mistral")
    real = packed_attention.packed_causal_attention
    with monkeypatch.context() as patch:
        patch.setattr(packed_attention, "packed_causal_attention", lambda *a, window=None, **rest: real(*a, **rest))
        assert "packed rows differ" in (packed_problem(base) or "")
    monkeypatch.setattr(SlidingAttention, "first_seen", lambda self, position: 0)
    assert "answers differ" in (served_problem(base) or "")


@pytest.mark.parametrize(("name", "what"), [("gemma2", "softcap"), ("gpt_oss", "sinks_H")])
def test_forgotten_caps_and_sinks_are_found(name, what, tmp_path, monkeypatch):
    base = write_base(tmp_path, name)
    real = packed_attention.scores_of
    for module in (packed_attention, attention):
        without = lambda given: {key: value for key, value in real(given).items() if key != what}  # noqa: E731
        monkeypatch.setattr(module, "scores_of", without)
    assert "packed rows differ" in (packed_problem(base) or "")
    assert "answers differ" in (served_problem(base) or "")


def test_forgotten_factors_of_logits_are_found(tmp_path, monkeypatch):
    from ftray.model.heads import causal_lm

    base = write_base(tmp_path, "cohere")
    monkeypatch.setattr(causal_lm, "logits_of", lambda config: lambda product: product)
    monkeypatch.setattr(text_model, "logits_of", lambda config: lambda product: product)
    assert "packed rows differ" in (packed_problem(base) or "")
    assert "answers differ" in (served_problem(base) or "")


@pytest.mark.parametrize("name", ["qwen3_next", "lfm2", "mamba2"])
def test_a_state_that_crosses_sequences_is_found(name, tmp_path, monkeypatch):
    base = write_base(tmp_path, name)
    whole = PackedStates.of_row
    one = lambda self, layout: whole(self, packed_layout([sum(layout.lengths)]))  # noqa: E731
    monkeypatch.setattr(PackedStates, "of_row", one)
    assert "packed rows differ" in (packed_problem(base) or "")


def test_a_state_that_is_not_gone_on_from_is_found(tmp_path, monkeypatch):
    base = write_base(tmp_path, "qwen3_next")
    real = states.StateStore.of_pieces

    def anew(store, pieces):
        real(store, pieces)
        store._rows = [replace(rows, goes_on=False) if rows.length > 1 else rows for rows in store._rows]

    monkeypatch.setattr(states.StateStore, "of_pieces", anew)
    assert "answers differ" in (served_problem(base) or "")


def test_a_page_is_not_enough_where_a_state_is_missing(tmp_path, monkeypatch):
    base = write_base(tmp_path, "lfm2")
    monkeypatch.setattr(states.StateStore, "__contains__", lambda store, name: True)
    monkeypatch.setattr(states.StateStore, "restore", lambda store, sequence: None)
    assert served_problem(base) is not None


def test_rotation_by_the_longest_of_a_row_is_found(tmp_path, monkeypatch):
    base = write_base(tmp_path, "phi3 (longrope)")
    monkeypatch.setattr(packed, "PackedRotary", lambda decoder: rotary.PackedRotary(torch.nn.Module()))
    monkeypatch.setattr(rotary, "short_context", lambda config: None)
    monkeypatch.setattr(torch.nn.Module, "config", None, raising=False)
    assert "packed rows differ" in (packed_problem(base) or "")


def test_temperature_by_the_place_in_a_row_is_found(tmp_path, monkeypatch):
    base = write_base(tmp_path, "llama4_text")
    monkeypatch.setattr(packed.QueryTemperature, "__init__", lambda self, decoder: None)
    assert "packed rows differ" in (packed_problem(base) or "")


def test_lora_that_no_gradient_reaches_is_found(tmp_path, monkeypatch):
    base = write_base(tmp_path, "llama")
    whole = packed_attention.packed_causal_attention
    frozen = lambda query, *rest, **how: whole(query.detach(), *rest, **how)  # noqa: E731
    monkeypatch.setattr(packed_attention, "packed_causal_attention", frozen)
    assert "gradients of LoRA differ" in (adapter_problem(base) or "")


def test_the_proof_loses_pages_and_finds_some(tmp_path, monkeypatch):
    """What it says it compares does happen."""
    seen, close = [], TorchEngine.close
    monkeypatch.setattr(TorchEngine, "close", lambda engine: (seen.append(engine.stats()), close(engine)))
    for name in ("llama", "qwen3_next"):
        assert served_problem(write_base(tmp_path / name, name)) is None
    assert all(stats.num_preemptions > 0 and stats.prompt_tokens_cached > 0 for stats in seen), seen


def test_the_zoo_is_no_part_of_the_project():
    assert not any("zoo" in path.name for path in (Path(proof.__file__).parents[2]).rglob("*.py"))
