"""The torch engine: the contract, and what it promises beyond it."""

import itertools

import pytest
import torch
from engine_contract import EngineContract, answers, greedy, run, tokens
from safetensors.torch import load_file, save_file

from ftray.config.serve import AdaptersConfig, EngineConfig
from ftray.infer.engines import load_adapter
from ftray.infer.protocol import Request, SamplingParams, StructuredOutput
from ftray.infer.torch_engine.cpu import kernels as cpu_kernels
from ftray.infer.torch_engine.engine import TorchEngine
from ftray.infer.torch_engine.kv_cache import PAGE_TOKENS, KVCache
from ftray.infer.torch_engine.scheduler import Scheduler
from ftray.model.hardware import choose_hardware


def make_engine(tiny_base, adapters=None, *, device_budget=2**30, **settings) -> TorchEngine:
    config = EngineConfig(**{"context_tokens": 256, "kv_cache_tokens": 4096} | settings)
    limits = AdaptersConfig(max_rank=64, device_budget=f"{device_budget}B")
    engine = TorchEngine(tiny_base, choose_hardware(), config, limits)
    for name, directory in (adapters or {}).items():
        load_adapter(engine, name, directory)
    return engine


@pytest.fixture(scope="module")
def prompts():
    return [[5, 9, 33, 60, 7], [40, 41, 42], [100, 7, 100, 9, 20, 31, 77], [12, 13], [8] * 9, list(range(20, 60))]


class TestContract(EngineContract):
    @pytest.fixture(scope="class")
    def engine(self, tiny_base):
        return make_engine(tiny_base)

    @pytest.fixture(scope="class")
    def base_directory(self, tiny_base):
        return tiny_base.directory


def long_prompts(count: int, length: int) -> list[list[int]]:
    """With no common beginning."""
    return [[(7 * i + 3 * j) % 90 + 5 for j in range(length)] for i in range(count)]


def test_prompts_in_pieces_equal_whole_prompts(tiny_base, adapters):
    requests = [Request(f"{i}", p, greedy(), "r8" if i % 2 else None) for i, p in enumerate(long_prompts(6, 100))]
    whole = answers(make_engine(tiny_base, adapters, max_prefill_tokens=4096), requests)
    assert answers(make_engine(tiny_base, adapters, max_prefill_tokens=24), requests) == whole
    assert answers(make_engine(tiny_base, adapters, max_prefill_tokens=1), requests[:2]) == {
        name: whole[name] for name in ("0", "1")
    }


def test_a_piece_that_sees_too_little_is_found(tiny_base, adapters, monkeypatch):
    """The twin: the pieces after the first forget what came before."""
    from ftray.infer.torch_engine import rows

    real = rows.prompts_of

    def forgetful(pieces, kernels, device):
        return real([(forget(pages, cached), cached, count) for pages, cached, count in pieces], kernels, device)

    def forget(pages, cached):
        before = cached // PAGE_TOKENS
        return [*[0] * before, *pages[before:]]

    requests = [Request("0", long_prompts(1, 100)[0], greedy())]
    whole = answers(make_engine(tiny_base), requests)
    monkeypatch.setattr(rows, "prompts_of", forgetful)
    assert answers(make_engine(tiny_base, max_prefill_tokens=24), requests) != whole


@pytest.mark.parametrize("name", ["r8", "up", None])
def test_layers_are_fetched_in_the_order_in_which_they_are_computed(tiny_base, adapters, monkeypatch, name):
    """And the adapters of the call after; a gated pair fetches none."""
    computed, linear = [], cpu_kernels.CpuKernels.linear

    def noted(self, layers, *args, **kwargs):
        computed.append((layers, kwargs.get("adapters"), kwargs.get("next_adapters")))
        return linear(self, layers, *args, **kwargs)

    monkeypatch.setattr(cpu_kernels.CpuKernels, "linear", noted)
    engine = make_engine(tiny_base, adapters)
    engine.add(Request("0", [5, 6, 7], greedy(max_tokens=1), name))
    engine.step()
    assert len(computed) > 4
    assert [layers.following for layers, *_ in computed] == [*(layers for layers, *_ in computed[1:]), None]
    for (layers, _, fetched), (_, own, _) in itertools.pairwise(computed):
        assert fetched is (own if len(layers.structs) == 1 else None)
    assert any(own is not None for _, own, _ in computed) == (name is not None)


def test_a_full_cache_pushes_the_newest_back_and_every_answer_stays_the_same(tiny_base, adapters):
    requests = [Request(f"{i}", p, greedy(max_tokens=60), "r4") for i, p in enumerate(long_prompts(8, 40))]
    roomy = make_engine(tiny_base, adapters)
    tight = make_engine(tiny_base, adapters, kv_cache_tokens=256)
    assert answers(tight, requests) == answers(roomy, requests)
    assert tight.stats().num_preemptions > 0
    assert roomy.stats().num_preemptions == 0
    assert tight.stats().kv_tokens_used == 0


def test_who_is_pushed_back_draws_the_same_tokens_again_and_tells_the_same(tiny_base, adapters):
    """Several answers of a seed, penalties that count them, a grammar that has read them, log-probabilities."""
    lines = StructuredOutput("regex", "([a-f]{3} ){12}")
    kinds = [
        SamplingParams(temperature=0.9, top_p=0.95, seed=5, n=2, max_tokens=48, ignore_eos=True, logprobs=1),
        SamplingParams(temperature=0.9, seed=6, n=2, max_tokens=48, ignore_eos=True, frequency_penalty=1.5, min_p=0.02),
        SamplingParams(temperature=1.0, seed=7, max_tokens=48, structure=lines),
        greedy(max_tokens=48, prompt_logprobs=1, repetition_penalty=1.3),
    ]
    requests = [Request(f"{i}", p, kinds[i % 4], "r8") for i, p in enumerate(long_prompts(8, 40))]
    roomy, tight = make_engine(tiny_base, adapters), make_engine(tiny_base, adapters, kv_cache_tokens=256)
    wanted, found = run(roomy, requests), run(tight, requests)
    assert tight.stats().num_preemptions > 0
    assert {key: tokens(events) for key, events in found.items()} == {key: tokens(e) for key, e in wanted.items()}
    for key, events in wanted.items():
        for event, same in zip(events, found[key], strict=True):
            assert (event.text, event.finish_reason) == (same.text, same.finish_reason)
            for reported, again in (
                (event.logprobs, same.logprobs),
                *zip(*map(prompt_event, (event, same)), strict=True),
            ):
                assert (reported is None) == (again is None)
                assert reported is None or reported.chosen == pytest.approx(again.chosen, abs=1e-4)


def test_a_token_lost_by_who_is_pushed_back_is_found(tiny_base, adapters, monkeypatch):
    """The twin of both."""
    push_back = Scheduler._preempt

    def forgetful(scheduler, sequence):
        push_back(scheduler, sequence)
        del sequence.tokens[-1]

    monkeypatch.setattr(Scheduler, "_preempt", forgetful)
    requests = [Request(f"{i}", p, greedy(max_tokens=60), "r4") for i, p in enumerate(long_prompts(8, 40))]
    tight = make_engine(tiny_base, adapters, kv_cache_tokens=256)
    assert answers(tight, requests) != answers(make_engine(tiny_base, adapters), requests)


def prompt_event(event) -> tuple:
    return event.prompt_logprobs or ()


def test_a_common_beginning_is_computed_once_for_each_adapter(tiny_base, adapters):
    engine = make_engine(tiny_base, adapters)
    start = list(range(10, 74))
    first = Request("a", [*start, 7], greedy(), "r4")
    run(engine, [first])
    for adapter, name, found in (("r4", "b", 64), ("r8", "c", 0), (None, "d", 0), ("r8", "e", 64)):
        events = run(engine, [Request(name, [*start, 9], greedy(), adapter)])[(name, 0)]
        assert events[0].num_cached_prompt_tokens == found
        fresh = make_engine(tiny_base, adapters)
        assert tokens(events) == answers(fresh, [Request(name, [*start, 9], greedy(), adapter)])[name]
    events = run(engine, [first])[("a", 0)]
    assert events[0].num_cached_prompt_tokens == 64  # of 65: the last token's logits are wanted
    assert engine.stats().prompt_tokens_cached == 3 * 64


def test_a_cache_that_is_not_salted_is_found(tiny_base, adapters, monkeypatch):
    """The twin: one adapter's keys and values served to another."""
    start = list(range(10, 74))
    request = Request("b", [*start, 9], greedy(), "r8")
    want = answers(make_engine(tiny_base, adapters), [request])
    engine = make_engine(tiny_base, adapters)
    monkeypatch.setattr(engine, "_salts", dict.fromkeys(engine._salts, b"same"))
    run(engine, [Request("a", [*start, 7], greedy(), "r4")])
    assert answers(engine, [request]) != want


def test_the_n_answers_share_their_prompt(tiny_base):
    engine = make_engine(tiny_base)
    events = run(engine, [Request("a", long_prompts(1, 100)[0], greedy(n=4, temperature=1.0, seed=1))])
    assert [events[("a", i)][0].num_cached_prompt_tokens for i in range(4)] == [0, 96, 96, 96]
    assert len({tuple(tokens(e)) for e in events.values()}) == 4


def huge_adapter(adapters, directory):
    """Finite weights that make infinity and NaN of every hidden state."""
    directory.mkdir()
    for path in adapters["r4"].iterdir():
        if path.suffix == ".json":
            (directory / path.name).write_bytes(path.read_bytes())
    weights = load_file(adapters["r4"] / "adapter_model.safetensors")
    save_file({name: torch.full_like(w, 3e38) for name, w in weights.items()}, directory / "adapter_model.safetensors")
    return directory


def beside_a_broken_one(engine, directory, requests):
    load_adapter(engine, "huge", directory)
    broken = [Request(f"broken{i}", p, greedy(max_tokens=20), "huge") for i, p in enumerate(long_prompts(4, 30))]
    beside = answers(engine, [*broken, *requests])
    return {r.id: beside[r.id] for r in requests}, answers(engine, requests)


def test_an_adapter_that_overflows_harms_nobody_not_even_through_pages_it_leaves(
    tiny_base, adapters, tmp_path, step_operations
):
    requests = [Request(f"{i}", p, greedy(max_tokens=20), "r8") for i, p in enumerate(long_prompts(6, 20))]
    want = answers(make_engine(tiny_base, adapters), requests)
    directory = huge_adapter(adapters, tmp_path / "huge")
    engine = make_engine(tiny_base, adapters, kv_cache_tokens=512)
    assert beside_a_broken_one(engine, directory, requests) == (want, want)


def test_pages_that_are_not_cleaned_are_found(tiny_base, adapters, tmp_path, monkeypatch):
    """The twin: NaN left in a page comes through the mask (the kernels read no page's unwritten places)."""
    monkeypatch.setattr(cpu_kernels, "compiled", lambda: None)
    monkeypatch.setattr(KVCache, "clear", lambda self, pages: None)
    requests = [Request(f"{i}", p, greedy(max_tokens=20), "r8") for i, p in enumerate(long_prompts(6, 20))]
    want = answers(make_engine(tiny_base, adapters), requests)
    engine = make_engine(tiny_base, adapters, kv_cache_tokens=512)
    assert beside_a_broken_one(engine, huge_adapter(adapters, tmp_path / "huge"), requests) != (want, want)


def test_more_adapters_than_the_device_holds_take_turns(tiny_base, adapters):
    """Slots for about one adapter at a time: all are served, with the answers they have when all fit."""
    requests = [
        Request(f"{i}", p, greedy(), name)
        for i, (p, name) in enumerate(zip(long_prompts(12, 12), list(adapters)[:6] * 2, strict=True))
    ]
    roomy = make_engine(tiny_base, adapters)
    want = answers(roomy, requests)
    sizes = [adapter.num_bytes for adapter in roomy._bank.host.values()]
    tight = make_engine(tiny_base, adapters, device_budget=max(sizes))
    for request in requests:
        tight.add(request)
    got: dict[str, list[int]] = {}
    while tight.has_work:
        for event in tight.step():
            got.setdefault(event.request_id, []).append(event.token_id)
        assert tight.stats().device_adapter_bytes <= max(sizes)
    assert got == want
    assert len(roomy.stats().adapters_on_device) == 6


def test_long_answers_that_take_turns_at_one_slot_stay_the_same(tiny_base, adapters):
    requests = [
        Request(f"{i}", p, greedy(max_tokens=150), name)
        for i, (p, name) in enumerate(zip(long_prompts(3, 12), adapters, strict=False))
    ]
    roomy = make_engine(tiny_base, adapters)
    want = answers(roomy, requests)
    tight = make_engine(tiny_base, adapters, device_budget=max(a.num_bytes for a in roomy._bank.host.values()))
    first: dict[str, int] = {}
    got: dict[str, list[int]] = {}
    for request in requests:
        tight.add(request)
    for step in itertools.count():
        if not tight.has_work:
            break
        for event in tight.step():
            first.setdefault(event.request_id, step)
            got.setdefault(event.request_id, []).append(event.token_id)
    assert got == want
    assert max(first.values()) < 150  # the last began before the first, alone, could have ended
    assert tight.stats().num_preemptions > 0
