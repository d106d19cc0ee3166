"""`adapter.train_tokens`: rows of single tokens, in the embedding and the head, are trained as PEFT trains them."""

import json

import pytest
import torch
from tiny import chat_rows, write_jsonl, write_tiny_model

from ftray.config import load_config
from ftray.config.adapter import AdapterConfig
from ftray.errors import AdapterError, UserError
from ftray.model import proof
from ftray.model.adapters.lora import inject_lora, load_weights_from, options_of, write_adapter
from ftray.model.adapters.merge import merge_adapter
from ftray.model.adapters.targets import check_embedding
from ftray.model.adapters.tokens import token_ids
from ftray.model.adapters.weights import read_adapter
from ftray.model.base import load_tokenizer, prepare_base
from ftray.model.hardware import choose_hardware
from ftray.model.packed import register_packed_attention
from ftray.model.proof import disturb, log_probs
from ftray.model.weight_files import weight_shapes
from ftray.model.weights import load_weights
from ftray.train.prepared_data import prepare_data

CONFIG = AdapterConfig(rank=4, alpha=8, train_tokens=["<|im_start|>", "a"])
IDS = [1, 60, 61, 2, 9, 1, 40]  # the first is a trained token


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def trained(request, tmp_path_factory):
    """(base, the packed model after its start, the adapter's directory)"""
    root = tmp_path_factory.mktemp("tokens")
    base = prepare_base(str(write_tiny_model(root / "base", tied=request.param)))
    model = load_weights(base, choose_hardware(), attention=register_packed_attention())
    ids = token_ids(load_tokenizer(base), CONFIG.train_tokens)
    inject_lora(model, CONFIG, seed=0, trained_ids=ids)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    disturb(parameters)
    weights = {name: p.detach() for name, p in parameters.items()}
    write_adapter(root / "adapter", weights, CONFIG, base, metadata={}, options=options_of(model))
    return base, model, root / "adapter"


def packed_log_probs(model) -> torch.Tensor:
    return proof.packed_log_probs(model, [IDS])[0]


def test_peft_loads_it_and_gives_the_same(trained):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, model, directory = trained
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.directory), directory)
    with torch.no_grad():
        torch.testing.assert_close(packed_log_probs(model), log_probs(loaded, IDS), rtol=1e-4, atol=1e-4)
        plain = AutoModelForCausalLM.from_pretrained(base.directory)
        assert (packed_log_probs(model) - log_probs(plain, IDS)).abs().max() > 0.1  # it does change them


def test_only_those_rows_and_lora_are_trained(trained):
    _, model, _ = trained
    names = [name for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name]
    ties = model.config.tie_word_embeddings
    assert len(names) == (1 if ties else 2)
    shapes = [tuple(p.shape) for name, p in model.named_parameters() if name in names]
    assert shapes == [(2, 64)] * len(names)
    model.zero_grad()
    packed_log_probs(model).sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (not parameter.requires_grad), name
        assert parameter.grad is None or parameter.grad.abs().max() > 0, name


def test_a_run_goes_on_from_it(trained):
    base, model, directory = trained
    again = load_weights(base, choose_hardware(), attention=register_packed_attention())
    inject_lora(again, CONFIG, seed=5, trained_ids=token_ids(load_tokenizer(base), CONFIG.train_tokens))
    load_weights_from(directory, again, CONFIG, label="it")
    with torch.no_grad():
        assert torch.equal(packed_log_probs(again), packed_log_probs(model))
    plain = AdapterConfig(rank=4, alpha=8)
    other = load_weights(base, choose_hardware(), attention=register_packed_attention())
    inject_lora(other, plain, seed=0)
    with pytest.raises(AdapterError, match="trainable_token_indices"):
        load_weights_from(directory, other, plain, label="it")


def test_it_is_served_merged(trained, tmp_path):
    base, model, directory = trained
    with pytest.raises(AdapterError, match=r"trainable_token_indices=.* merge it into its base"):
        read_adapter(directory, label="it")
    from transformers import AutoModelForCausalLM

    merged = merge_adapter(directory, base, tmp_path / "merged", label="it")
    with torch.no_grad():
        found = log_probs(AutoModelForCausalLM.from_pretrained(merged), IDS)
        torch.testing.assert_close(found, packed_log_probs(model), rtol=1e-4, atol=1e-4)


def test_what_is_no_token_is_refused(tiny_base):
    with pytest.raises(AdapterError, match=r"adapter\.train_tokens: '<x>' is no token"):
        token_ids(load_tokenizer(tiny_base), ["<x>"])


def test_a_token_without_a_row_is_named_before_the_run(tmp_path):
    """faults/data.md N11: a tokenizer of 260, an embedding of 259 rows."""
    base = write_tiny_model(tmp_path / "base")
    tokenizer = load_tokenizer(prepare_base(str(base)))
    tokenizer.add_tokens(["<x>"])
    tokenizer.save_pretrained(base)
    rows = chat_rows(3)
    for place, text in ((1, "plain"), (2, "a <x> b")):
        rows[place]["messages"][-1]["content"] = text
    file = write_jsonl(tmp_path / "train.jsonl", rows)
    (tmp_path / "run.yaml").write_text(
        json.dumps(
            {
                "kind": "run",
                "name": "r",
                "base_model": str(base),
                "max_steps": 1,
                "data": {"train": str(file), "max_example_tokens": 256},
                "batch": {"tokens_per_micro_batch": 512},
            }
        )
    )
    config = load_config(str(tmp_path / "run.yaml"), [], kind="run")
    with pytest.raises(UserError, match=r"data: row 3: '<x>' is token 259, and the embedding of .* has 259 rows"):
        prepare_data(config, log=lambda text: None)
    check_embedding(prepare_base(str(base)), weight_shapes(base), tokenizer, torch.tensor([1, 258]).numpy(), str)
