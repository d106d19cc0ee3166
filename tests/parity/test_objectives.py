"""The objectives beside sft: loss and gradient equal TRL's on the same rows; broken maths is found."""

import json
import math

import pytest
import torch
from tiny import SHARED_DATA, lora_value, write_jsonl
from torch import nn

from ftray.config.adapter import AdapterConfig
from ftray.config.data import DataConfig
from ftray.data.dataset import RowCounts
from ftray.data.examples import examples_of
from ftray.data.pack import dummy_row, pack
from ftray.data.tokens import tokenize_source
from ftray.model.adapters.lora import inject_lora, without_adapter
from ftray.model.hardware import choose_hardware
from ftray.model.packed import PackedCausalLM, register_packed_attention
from ftray.model.weights import load_weights
from ftray.objectives import OBJECTIVES, LogProbs, make_loss
from ftray.objectives.dpo import DpoConfig

# TRL closes an assistant turn without the line break that our tiny template has, which is never generated.
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}"
    "{% if not (loop.last and m['role'] == 'assistant') %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LORA = AdapterConfig(rank=4, alpha=8)


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


PAIRS = [
    {"prompt": [user("where is my card")], "chosen": [assistant("on its way")], "rejected": [assistant("no")]},
    {"prompt": [user("hi"), assistant("hello"), user("refund?")], "chosen": [assistant("yes")],
     "rejected": [assistant("never, go")]},
    {"prompt": [user("pin")], "chosen": [assistant("in the app")], "rejected": [assistant("I do not know at all")]},
]  # fmt: skip
DOCUMENTS = [{"text": "the card was lost"}, {"text": "a transfer takes two days, sometimes three"}, {"text": "ok"}]


def set_lora(model: nn.Module, *, prefix: str = "") -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(lora_value(name.removeprefix(prefix), parameter.shape))


def our_loss_and_gradients(tiny_base, renderer, path, kind, *, adapter, break_it=None, **settings):
    """(loss, metrics, {parameter: gradient})"""
    dataset = tokenize_source(
        "data.train", str(path), DataConfig(train=str(path)), renderer, shape=OBJECTIVES[kind].shape
    )
    model = load_weights(tiny_base, choose_hardware(), attention=register_packed_attention())
    reference = PackedCausalLM(load_weights(tiny_base, choose_hardware(), attention=register_packed_attention()))
    if adapter:
        inject_lora(model, LORA, seed=0)
        set_lora(model)
    else:
        shift(model)
    packed = PackedCausalLM(model)
    loss_of = make_loss(OBJECTIVES[kind].config(type=kind, **settings))
    row = pack(examples_of(dataset, list(range(len(dataset)))))
    with torch.no_grad():
        if adapter:
            with without_adapter(model):
                reference_N = packed(row)
        else:
            reference_N = reference(row)
    if break_it == "reference":
        reference_N = torch.zeros_like(reference_N)
    loss = loss_of(LogProbs(packed(row), reference_N), row)
    count = loss.count.item()
    (loss.sum / count).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return loss.sum.item() / count, {k: v.item() / count for k, v in loss.metrics.items()}, gradients


def shift(model: nn.Module) -> None:
    """Away from the reference, the same in both programs."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(lora_value(name, parameter.shape), alpha=0.1)


def trl_dpo(tiny_base, rows, tmp_path, *, adapter, **settings):
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(tiny_base.directory)
    tokenizer.chat_template = TEMPLATE
    peft = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM") if adapter else None
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_base.directory),
        ref_model=None if adapter else AutoModelForCausalLM.from_pretrained(tiny_base.directory),
        args=DPOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=len(rows),
            report_to=[],
            max_length=None,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            **settings,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=peft,
    )
    model = trainer.model
    prefix = "base_model.model."
    set_lora(model, prefix=prefix) if adapter else shift(model)
    batch = next(iter(trainer.get_train_dataloader()))
    model.eval()
    loss = trainer.compute_loss(model, batch)
    loss.backward()
    rewards = {key: values[-1] for key, values in trainer._metrics["train"].items() if key.startswith("rewards/")}
    rewards |= {key: values[-1] for key, values in trainer._metrics["eval"].items() if key.startswith("rewards/")}
    return (
        loss.item(),
        rewards,
        {n.removeprefix(prefix): p.grad for n, p in model.named_parameters() if p.requires_grad},
    )


@pytest.mark.parametrize("adapter", [True, False], ids=["lora", "full"])
def test_dpo_loss_and_gradient_are_trls(tiny_base, renderer, tmp_path, adapter):
    path = write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
    loss, metrics, gradients = our_loss_and_gradients(tiny_base, renderer, path, "dpo", adapter=adapter, beta=0.3)
    expected, rewards, expected_gradients = trl_dpo(tiny_base, PAIRS, tmp_path, adapter=adapter, beta=0.3)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert metrics["reward_margin"] == pytest.approx(rewards["rewards/margins"], rel=1e-4)
    assert metrics["reward_accuracy"] == pytest.approx(rewards["rewards/accuracies"])
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-3, atol=1e-5)
    broken, _, _ = our_loss_and_gradients(
        tiny_base, renderer, path, "dpo", adapter=adapter, beta=0.3, break_it="reference"
    )
    assert broken != pytest.approx(expected, rel=1e-5)


def test_a_new_adapter_starts_at_log_2(tiny_base, renderer, tmp_path):
    """B is zero, so policy and reference agree: -log sigmoid(0)."""
    path = write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
    dataset = tokenize_source("data.train", str(path), DataConfig(train=str(path)), renderer, shape="pair")
    model = load_weights(tiny_base, choose_hardware(), attention=register_packed_attention())
    inject_lora(model, LORA, seed=0)
    packed, row = PackedCausalLM(model), pack(examples_of(dataset, [0, 1, 2]))
    with torch.no_grad(), without_adapter(model):
        reference_N = packed(row)
    loss = make_loss(DpoConfig(type="dpo", beta=0.1))(LogProbs(packed(row), reference_N), row)
    assert loss.sum.item() / loss.count.item() == pytest.approx(math.log(2), rel=1e-6)
    assert all(p.requires_grad for n, p in model.named_parameters() if "lora_" in n), "the adapter is on again"


def test_a_dummy_pair_adds_nothing(tiny_base):
    model = PackedCausalLM(load_weights(tiny_base, choose_hardware(), attention=register_packed_attention()))
    row = dummy_row(2)
    log_probs = model(row)
    loss = make_loss(DpoConfig(type="dpo", beta=0.1))(LogProbs(log_probs, log_probs.detach()), row)
    assert (loss.sum.item(), loss.count.item()) == (0.0, 0.0)
    assert all(value.item() == 0 for value in loss.metrics.values())


def test_domain_loss_and_gradient_are_trls(tiny_base, renderer, tmp_path):
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_base.directory),
        args=SFTConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=3,
            report_to=[],
            max_length=None,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            loss_type="nll",
        ),
        train_dataset=Dataset.from_list(DOCUMENTS),
        processing_class=AutoTokenizer.from_pretrained(tiny_base.directory),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    model = trainer.model
    set_lora(model, prefix="base_model.model.")
    model.eval()
    expected = trainer.compute_loss(model, next(iter(trainer.get_train_dataloader())), num_items_in_batch=None)
    expected.backward()
    gradients = {n.removeprefix("base_model.model."): p.grad for n, p in model.named_parameters() if p.requires_grad}
    path = write_jsonl(tmp_path / "documents.jsonl", DOCUMENTS)
    loss, _, ours = our_loss_and_gradients(tiny_base, renderer, path, "text", adapter=True)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-3, atol=1e-5)


def test_a_split_document_loses_no_target(renderer, tmp_path):
    path = write_jsonl(tmp_path / "documents.jsonl", DOCUMENTS)

    def tokens(**settings):
        data = DataConfig(train=str(path), **settings)
        return tokenize_source("data.train", str(path), data, renderer, shape="document")

    whole, split = tokens(), tokens(max_example_tokens=8, overlong="split")
    assert len(split) > len(whole)
    assert split.lengths.max() == 8
    assert split.trained_lengths.sum() == whole.trained_lengths.sum()
    assert split.row_counts == (RowCounts(3),)
    assert list(split.rows) == sorted(split.rows)


def test_the_shared_preference_rows_are_read(renderer):
    path = SHARED_DATA / "dpo_en_demo.json"
    if not path.is_file():
        pytest.skip("the shared data are not on this machine")
    data = DataConfig(train=str(path), max_example_tokens=100_000)
    dataset = tokenize_source("data.train", str(path), data, renderer, shape="pair")
    row = json.loads(path.read_text())[0]
    chosen, rejected = dataset.sequences(0)
    assert renderer.tokenizer.decode(chosen[0][chosen[1]]) == row["chosen"]["value"] + "<|im_end|>"
    assert renderer.tokenizer.decode(rejected[0][rejected[1]]) == row["rejected"]["value"] + "<|im_end|>"
    assert len(dataset) == 300
