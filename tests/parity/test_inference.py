"""The engine: adapters of mixed rank in one batch equal peft one adapter at a time; mixed answers equal solo answers;
served prompts and logits are those of training."""

import shutil
from pathlib import Path

import pytest
import torch
from engine_contract import NEAR_TIE, Reference, answers
from safetensors.torch import load_file, save_file
from tiny import chat_rows, write_jsonl

from ftray.config.adapter import AdapterConfig
from ftray.config.data import DataConfig
from ftray.config.serve import AdaptersConfig, EngineConfig
from ftray.data.examples import examples_of
from ftray.data.pack import pack
from ftray.data.tokens import tokenize_source
from ftray.infer.engines import generate, load_adapter
from ftray.infer.protocol import Request, SamplingParams
from ftray.infer.torch_engine.engine import TorchEngine
from ftray.infer.torch_engine.lora import batch as adapter_runs
from ftray.model.adapters.lora import inject_lora, load_weights_from
from ftray.model.hardware import choose_hardware
from ftray.model.packed import PackedCausalLM, PackedRow, register_packed_attention
from ftray.model.packed_attention import packed_layout
from ftray.model.weights import load_weights

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def make_engine(tiny_base, adapters, *, limits: dict | None = None, **settings) -> TorchEngine:
    config = EngineConfig(**({"context_tokens": 256, "kv_cache_tokens": 8192, "max_sequences": 32} | settings))
    engine = TorchEngine(tiny_base, choose_hardware(), config, AdaptersConfig(**{"max_rank": 64} | (limits or {})))
    for name, directory in adapters.items():
        load_adapter(engine, name, directory)
    return engine


@pytest.fixture(scope="module")
def engine(tiny_base, adapters, step_operations):
    return make_engine(tiny_base, adapters)


def peft_log_probs(tiny_base, directory, ids):
    return Reference(tiny_base.directory, {"it": directory}).log_probs(None if directory is None else "it", ids)


PROMPTS = [
    [5, 9, 33, 60, 7],
    [40, 41, 42],
    [100, 7, 100, 9, 20, 31, 77],
    [12, 13],
    [8] * 9,
    [90, 17, 3],
    [6, 7, 8, 9],
    [55] * 3,
]
MIX = ["r4", "r8", "r16", "qv", None, "up", "r4b", "r4c"]


def mixed_log_probs(engine, mix=MIX) -> list[torch.Tensor]:
    """All prompts in one forward pass, each with its own adapter."""
    ids = torch.tensor([i for prompt in PROMPTS for i in prompt])
    lengths = [len(prompt) for prompt in PROMPTS]
    positions = torch.cat([torch.arange(length) for length in lengths])
    from ftray.infer.torch_engine.attention import AttentionStep, Prompts

    prompts = Prompts(packed_layout(lengths))
    step = AttentionStep(engine._text.kinds, cache=None, write_slots_T=None, decoding=None, prompts=prompts)
    with torch.inference_mode(), engine.pinned(*mix):
        hidden = engine._text.hidden(ids, positions, list(zip(mix, lengths, strict=True)), step)
        return list(engine._text.logits(hidden).log_softmax(-1).split(lengths))


@pytest.mark.parametrize("few", [0, 1000], ids=["an adapter at a time", "neighbours together"])
def test_mixed_ranks_equal_peft(engine, tiny_base, adapters, monkeypatch, few):
    monkeypatch.setattr(adapter_runs, "FEW_TOKENS", few)
    engine._bank._forget_runs()
    for log_probs, prompt, name in zip(mixed_log_probs(engine), PROMPTS, MIX, strict=True):
        torch.testing.assert_close(log_probs, peft_log_probs(tiny_base, adapters.get(name), prompt), **CLOSE)


def test_adapters_saved_in_bfloat16_are_held_in_it(tiny_base, adapters, step_operations, tmp_path):
    """Beside ones of float32, whose numbers bfloat16 would not hold."""
    saved = {f"{name} half": saved_in_bfloat16(adapters[name], tmp_path / name) for name in ("r4", "r8", "r16", "qv")}
    mix = ["r4 half", "r8 half", "r16 half", "qv half", None, "r4", "r8", "r16"]
    engine = make_engine(tiny_base, adapters | saved)
    held = {name: adapter.num_bytes for name, adapter in engine._bank.host.items()}
    share = 0.5 if step_operations == "our kernels" else 1
    assert [held[f"{name} half"] / held[name] for name in ("r4", "r8", "r16", "qv")] == [share] * 4
    for log_probs, prompt, name in zip(mixed_log_probs(engine, mix), PROMPTS, mix, strict=True):
        torch.testing.assert_close(log_probs, peft_log_probs(tiny_base, (adapters | saved).get(name), prompt), **CLOSE)
    with pytest.raises(AssertionError):  # the twin: those that were not rounded
        torch.testing.assert_close(
            mixed_log_probs(engine, mix)[2], peft_log_probs(tiny_base, adapters["r16"], PROMPTS[2]), **CLOSE
        )


def test_adapters_rounded_on_request_answer_as_if_saved_so(tiny_base, adapters, step_operations, tmp_path):
    saved = {name: saved_in_bfloat16(adapters[name], tmp_path / name) for name in adapters}
    engine = make_engine(tiny_base, adapters, limits={"dtype": "bfloat16"})
    for name, log_probs, prompt in zip(MIX, mixed_log_probs(engine), PROMPTS, strict=True):
        torch.testing.assert_close(log_probs, peft_log_probs(tiny_base, saved.get(name), prompt), **CLOSE)
    held = {name: adapter.num_bytes for name, adapter in engine._bank.host.items()}
    exact = make_engine(tiny_base, adapters)._bank.host
    assert held == {name: adapter.num_bytes / 2 for name, adapter in exact.items()}


def saved_in_bfloat16(adapter: Path, directory: Path) -> Path:
    shutil.copytree(adapter, directory)
    weights = directory / "adapter_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(weights).items()}, weights)
    return directory


def test_rows_of_the_wrong_adapter_are_found(engine, tiny_base, adapters, monkeypatch):
    """The twin: each adapter is applied to the row before its own."""
    make_run, new_run = adapter_runs.make_run, adapter_runs.SlabRun

    def shifted(group, device):
        run = make_run(group, device)
        run.rows = run.rows.roll(1)
        run.real = torch.arange(len(run.rows))
        return run

    def exchanged(spans):
        places = [place for place, _, _ in spans]
        return new_run([(place, *rows) for place, (_, *rows) in zip(places[-1:] + places[:-1], spans, strict=True)])

    monkeypatch.setattr(adapter_runs, "FEW_TOKENS", 1000)
    monkeypatch.setattr(adapter_runs, "make_run", shifted)
    monkeypatch.setattr(adapter_runs, "SlabRun", exchanged)
    engine._bank._forget_runs()
    wrong = mixed_log_probs(engine)
    engine._bank._forget_runs()
    with pytest.raises(AssertionError):
        torch.testing.assert_close(wrong[6], peft_log_probs(tiny_base, adapters["r4b"], PROMPTS[6]), **CLOSE)


def test_a_swapped_adapter_is_found(engine, tiny_base, adapters):
    with pytest.raises(AssertionError):
        torch.testing.assert_close(
            mixed_log_probs(engine)[0], peft_log_probs(tiny_base, adapters["r8"], PROMPTS[0]), **CLOSE
        )


def requests(renderer, count: int, max_tokens: int = 12) -> list[Request]:
    names = ["r4", "r8", "r16", "qv"]
    rows = chat_rows(count, seed=8)
    return [
        Request(
            str(i),
            renderer.prompt_ids(row["messages"][:1]),
            SamplingParams(temperature=0, max_tokens=max_tokens),
            names[i % 4],
        )
        for i, row in enumerate(rows)
    ]


def test_32_mixed_answers_equal_solo_answers(engine, tiny_base, adapters, renderer):
    wanted = requests(renderer, 32)
    mixed = answers(engine, wanted)
    for request in wanted:
        solo = answers(engine, [request])[request.id]
        same_until_near_tie(mixed[request.id], solo, request, tiny_base, adapters)


def same_until_near_tie(mixed, solo, request, tiny_base, adapters) -> None:
    for place, (a, b) in enumerate(zip(mixed, solo, strict=False)):
        if a != b:
            ids = [*request.prompt_ids, *solo[:place]]
            top = peft_log_probs(tiny_base, adapters[request.adapter], ids)[-1].topk(2).values
            assert top[0] - top[1] < NEAR_TIE, f"request {request.id} differs at token {place}"
            return
    assert len(mixed) == len(solo)


def test_solo_answers_are_transformers_generate(engine, tiny_base, adapters, renderer):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    for request in requests(renderer, 4):
        model = AutoModelForCausalLM.from_pretrained(tiny_base.directory)
        model = PeftModel.from_pretrained(model, adapters[str(request.adapter)])
        prompt = torch.tensor([list(request.prompt_ids)])
        out = model.generate(input_ids=prompt, max_new_tokens=12, do_sample=False, eos_token_id=list(engine.stop_ids))
        same_until_near_tie(
            answers(engine, [request])[request.id], out[0, prompt.shape[1] :].tolist(), request, tiny_base, adapters
        )


def test_a_cache_that_forgets_is_found(tiny_base, adapters, renderer, monkeypatch):
    """The twin of the two above: reading the wrong cache slots changes answers."""
    from ftray.infer.torch_engine import rows

    broken = make_engine(tiny_base, adapters)
    wanted = requests(renderer, 8)
    right = answers(broken, wanted)
    real = rows.Decoding
    monkeypatch.setattr(rows, "Decoding", lambda pages, *rest: real([own[::-1] for own in pages], *rest))
    assert answers(broken, wanted) != right


def test_more_requests_than_places_and_cache_wait_their_turn(tiny_base, adapters, renderer):
    small = make_engine(tiny_base, adapters, max_sequences=3, kv_cache_tokens=256)
    large = make_engine(tiny_base, adapters)
    wanted = requests(renderer, 12)
    for request in wanted:
        small.add(request)
    most = 0
    while small.has_work:
        small.step()
        most = max(most, small.stats().num_running)
    assert most <= 3
    assert small.stats().kv_tokens_used == 0
    assert generate(small, wanted).keys() == generate(large, wanted).keys()


def test_a_seed_gives_the_same_answer_in_any_company(engine, renderer):
    prompt = renderer.prompt_ids([{"role": "user", "content": "where"}])
    sampling = SamplingParams(temperature=0.9, top_p=0.8, seed=7, max_tokens=10)
    alone = answers(engine, [Request("x", prompt, sampling, "r8")])["x"]
    company = [Request(str(i), prompt, SamplingParams(temperature=1, max_tokens=10), "r4") for i in range(5)]
    together = answers(engine, [*company, Request("x", prompt, sampling, "r8")])["x"]
    assert alone == together
    assert (
        alone
        != answers(engine, [Request("x", prompt, SamplingParams(temperature=0.9, seed=8, max_tokens=10), "r8")])["x"]
    )


def test_served_logits_and_prompts_are_those_of_training(tiny_base, renderer, tmp_path, engine, adapters):
    """The engine's layers with a PEFT directory == the training model with the same weights injected by peft."""
    path = write_jsonl(tmp_path / "d.jsonl", chat_rows(6, seed=4))
    dataset = tokenize_source("data.train", str(path), DataConfig(train=str(path)), renderer)
    model = load_weights(tiny_base, choose_hardware(), attention=register_packed_attention())
    config = AdapterConfig(rank=8, alpha=16)
    inject_lora(model, config, seed=0)
    load_weights_from(adapters["r8"], model, config, label="r8")
    row: PackedRow = pack(examples_of(dataset, list(range(6))))
    with torch.no_grad():
        trained = PackedCausalLM(model)(row)
    torch.testing.assert_close(engine.score(row, "r8"), trained, **CLOSE)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(engine.score(row, "r4"), trained, **CLOSE)
    for index, record in enumerate(chat_rows(6, seed=4)):
        prompt = renderer.prompt_ids(record["messages"][:1])
        assert dataset.sequences(index)[0][0][: len(prompt)].tolist() == prompt
