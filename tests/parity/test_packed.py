"""Packed rows: the same as one by one, whatever the neighbours; equal to transformers' own attention and TRL's loss."""

import pytest
import torch
from fake_engine import FakeEngine
from tiny import SHARED_DATA, chat_rows, lora_value, write_jsonl

from ftray.config.data import DataConfig
from ftray.data.examples import examples_of
from ftray.data.pack import dummy_row, pack
from ftray.data.tokens import tokenize_source
from ftray.model.adapters.lora import inject_lora
from ftray.model.hardware import choose_hardware
from ftray.model.packed import PackedCausalLM, register_packed_attention
from ftray.model.packed_attention import packed_layout
from ftray.model.weights import load_weights
from ftray.objectives import LogProbs, sft_loss

# float32 sums in another order
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, renderer):
    path = write_jsonl(tmp_path_factory.mktemp("d") / "d.jsonl", chat_rows(12, seed=3))
    return tokenize_source("data.train", str(path), DataConfig(train=str(path)), renderer)


@pytest.fixture(scope="module")
def model(tiny_base):
    return PackedCausalLM(load_weights(tiny_base, choose_hardware(), attention=register_packed_attention()))


def one_by_one(model, dataset, indices):
    return torch.cat([model(pack(examples_of(dataset, [i]))) for i in indices])


def test_packed_equals_one_by_one(model, dataset):
    together = model(pack(examples_of(dataset, list(range(12)))))
    torch.testing.assert_close(together, one_by_one(model, dataset, range(12)), **CLOSE)


def test_a_neighbour_changes_nothing(model, dataset):
    first = model(pack(examples_of(dataset, [0, 1, 2])))
    other = model(pack(examples_of(dataset, [0, 5, 7])))
    count = len(pack(examples_of(dataset, [0])).rows_N)
    torch.testing.assert_close(first[:count], other[:count], **CLOSE)


def test_a_layout_without_boundaries_is_found(model, dataset):
    """The twin: were the row one sequence, neighbours would leak and the comparison above would fail."""
    row = pack(examples_of(dataset, [1, 0]))
    leaky = row.__class__(**{**vars(row), "layout": packed_layout([len(row.ids_T)])})
    count = len(pack(examples_of(dataset, [1])).rows_N)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(model(leaky)[count:], model(pack(examples_of(dataset, [0]))), **CLOSE)


def test_the_packed_attention_is_transformers_attention(model, dataset, tiny_base):
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(tiny_base.directory)
    row = pack(examples_of(dataset, [4]))
    logits = plain(row.ids_T[None]).logits[0].log_softmax(-1)
    expected = logits[row.rows_N].gather(1, row.targets_N[:, None])[:, 0]
    torch.testing.assert_close(model(row), expected, **CLOSE)


def test_logits_in_chunks_are_the_same(model, dataset, monkeypatch):
    row = pack(examples_of(dataset, list(range(12))))
    whole = model(row)
    whole.sum().backward()
    gradient = model.model.get_input_embeddings().weight.grad.clone()
    model.zero_grad()
    monkeypatch.setattr("ftray.model.packed.LOGIT_ROWS", 7)
    chunked = model(row)
    chunked.sum().backward()
    torch.testing.assert_close(chunked, whole, **CLOSE)
    torch.testing.assert_close(model.model.get_input_embeddings().weight.grad, gradient, **CLOSE)


def test_a_dummy_row_adds_nothing(model):
    loss = sft_loss(LogProbs(model(dummy_row())), dummy_row())
    model.zero_grad()
    loss.sum.backward()
    assert loss.sum.item() == 0
    assert loss.count.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("lengths", [[1], [3, 3, 3], [1, 9, 2, 30, 30, 5], list(range(1, 20))])
def test_every_token_has_its_place_in_a_layout(lengths):
    layout = packed_layout(lengths)
    padded = torch.cat([bucket.gather_nL for bucket in layout.buckets])
    assert torch.equal(padded.index_select(0, layout.scatter_T), torch.arange(sum(lengths)))
    real = sum(lengths)
    assert len(padded) <= 1.25 * real + 1


def trl_loss(tiny_base, rows, tmp_path):
    """TRL's SFTTrainer on the rows as one batch: its collator, its loss, its gradient of the LoRA weights."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(tiny_base.directory)
    # TRL finds assistant tokens through this marker; ftray needs none.
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}"
        "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_base.directory)
    torch.manual_seed(0)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(tmp_path),
            assistant_only_loss=True,
            per_device_train_batch_size=len(rows),
            report_to=[],
            max_length=None,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            loss_type="nll",
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    trained = trainer.model
    with torch.no_grad():
        for name, parameter in (p for p in trained.named_parameters() if "lora_" in p[0]):
            parameter.copy_(lora_value(name.removeprefix("base_model.model."), parameter.shape))
    trained.eval()
    loss = trainer.compute_loss(trained, batch, num_items_in_batch=None)
    loss.backward()
    gradients = {n.removeprefix("base_model.model."): p.grad for n, p in trained.named_parameters() if "lora_" in n}
    return loss.item(), gradients


@pytest.mark.parametrize("source", ["made", "alpaca"])
def test_sft_loss_and_gradient_are_trls(tiny_base, renderer, tmp_path, source):
    from ftray.config.adapter import AdapterConfig

    rows = made_rows() if source == "made" else alpaca_rows()
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    dataset = tokenize_source("data.train", str(path), DataConfig(train=str(path)), renderer)
    model = load_weights(tiny_base, choose_hardware(), attention=register_packed_attention())
    inject_lora(model, AdapterConfig(rank=4, alpha=8), seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(lora_value(name, parameter.shape))
    row = pack(examples_of(dataset, list(range(len(dataset)))))
    loss = sft_loss(LogProbs(PackedCausalLM(model)(row)), row)
    (loss.sum / loss.count).backward()
    expected, gradients = trl_loss(tiny_base, rows, tmp_path)
    assert (loss.sum / loss.count).item() == pytest.approx(expected, rel=1e-5)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-5)
    # the twin: with the mean of each example's mean, which is another normaliser, the losses would differ
    means = [-(PackedCausalLM(model)(pack(examples_of(dataset, [i])))).mean().item() for i in range(len(dataset))]
    assert sum(means) / len(means) != pytest.approx(expected, rel=1e-5)


def made_rows():
    turns = [{"role": "user", "content": "again"}, {"role": "assistant", "content": "once more, then"}]
    rows = chat_rows(4, seed=5)
    return [*rows[:3], {"messages": rows[3]["messages"] + turns}]


def alpaca_rows():
    import json

    path = SHARED_DATA / "alpaca_en_demo.json"
    if not path.is_file():
        pytest.skip("the shared data are not on this machine")
    short = [r for r in json.loads(path.read_text()) if len(r["instruction"] + r["input"] + r["output"]) < 160][:6]
    return [
        {
            "messages": [
                {"role": "user", "content": f"{r['instruction']}\n\n{r['input']}".strip()},
                {"role": "assistant", "content": r["output"]},
            ]
        }
        for r in short
    ]


def test_samples_ask_what_evaluation_asks(tmp_path, renderer):
    """The last assistant turn, with all that came before it."""
    from ftray.train.hooks.samples import take_prompts

    talk = [
        {"role": "user", "content": "Capital of France?"},
        {"role": "assistant", "content": "Paris"},
        {"role": "user", "content": "Are you sure?"},
        {"role": "assistant", "content": "Yes."},
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": talk}])
    (prompt,) = take_prompts(tokenize_source("data.eval", str(path), DataConfig(train=str(path)), renderer), 1)
    assert prompt.ids == renderer.prompt_ids(talk[:3])
    assert renderer.tokenizer.decode(prompt.expected, skip_special_tokens=True) == "Yes."


def test_sampled_answers_are_transformers_greedy_generation(model, dataset, tiny_base):
    from transformers import AutoModelForCausalLM

    from ftray.train.hooks.samples import sample_answers, take_prompts

    class Predicting(FakeEngine):
        def next_tokens(self, row):
            return model(row, predict=True).tolist()

    prompts = take_prompts(dataset, 4)
    stop = 2  # <|im_end|>
    with torch.no_grad():
        answers = sample_answers(Predicting(), prompts, max_tokens=8, stop_ids=frozenset([stop]))
    plain = AutoModelForCausalLM.from_pretrained(tiny_base.directory)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt.ids])
        out = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        expected = out[0, len(prompt.ids) :].tolist()
        assert answer == (expected[: expected.index(stop)] if stop in expected else expected)
    assert len({tuple(answer) for answer in answers}) > 1
