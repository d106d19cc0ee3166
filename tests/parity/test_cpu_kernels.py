"""Each CPU kernel against torch's operations, on shapes with remainders; and that rows do not depend on each other."""

import gc
import itertools
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ftray.infer.torch_engine.attention import Decoding, can_attend, prompts_of
from ftray.infer.torch_engine.cpu import kernels as cpu_kernels
from ftray.infer.torch_engine.cpu.huge_pages import BLOCK_BYTES, HugePages, empty_bytes
from ftray.infer.torch_engine.cpu.kernels import AdaptersArray, Layers, RmsNorm, in_blocks
from ftray.infer.torch_engine.decoder import rotate_
from ftray.infer.torch_engine.kv_cache import PAGE_TOKENS, KVCache
from ftray.infer.torch_engine.lora.batch import StepRuns
from ftray.infer.torch_engine.lora.slots import Factors, Place, Segment, Slab
from ftray.model.families import FullAttention, SlidingAttention

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
FULL, CPU = FullAttention(1, 1), torch.device("cpu")


@pytest.fixture(
    scope="module", params=[(), ("-mno-avx512f", "-mtune=znver3")], ids=["this machine's", "without AVX-512"]
)
def kernels(request):
    if request.param and "avx512f" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("the same code as for this machine")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_kernels, "FLAGS", (*cpu_kernels.FLAGS, *request.param))
        made = cpu_kernels.compiled.__wrapped__()
    assert made is not None
    return made


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("width", [1, 15, 64, 577])
def test_norm(kernels, width):
    x, weight = drawn(5, width), drawn(width, seed=2)
    normed = functional.rms_norm(x, (width,), weight, 1e-6)
    torch.testing.assert_close(kernels.rms_norm(x, RmsNorm(weight, 1e-6)), normed, **CLOSE)


def gated_product(kernels, auth: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of two rows: layers whose biases they are."""
    nothing = torch.zeros(auth.numel(), 1)
    layers = Layers.packed(nothing, auth).beside(Layers.packed(nothing, up))
    return kernels.linear(layers, torch.zeros(1, 1))[0]


def test_gated_product_of_extremes(kernels):
    auth = torch.tensor([-1e30, -200.0, -88.0, 0.0, 88.0, 200.0, 1e30, float("nan")])
    out = gated_product(kernels, auth, torch.ones_like(auth))
    torch.testing.assert_close(out, functional.silu(auth), rtol=1e-5, atol=1e-30, equal_nan=True)
    auth, up = drawn(577) * 30, drawn(577, seed=1)
    torch.testing.assert_close(gated_product(kernels, auth, up), functional.silu(auth) * up, **CLOSE)


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "width"),
    [
        (3, 3, 64),
        (4, 2, 64),
        (9, 3, 64),
        (6, 1, 64),
        (2, 2, 128),
        (7, 1, 128),
        (4, 4, 32),
        (3, 1, 80),
        (10, 2, 80),
        (2, 1, 512),
    ],
)
def test_rotation_and_attention(kernels, num_heads, num_kv_heads, width):
    lengths = [1, PAGE_TOKENS, 3 * PAGE_TOKENS + 5, 40]
    cache = KVCache({0: (num_kv_heads, width)}, num_tokens=256, like=torch.zeros(0))
    layer = cache.layers[0].copy_(drawn(*cache.layers[0].shape, seed=3))
    pages = [[7], [2, 9], [4, 1, 12, 6], [3, 5, 11]]
    heads = drawn(4, num_heads + 2 * num_kv_heads, width, seed=4)
    angles = drawn(4, width // 2, seed=5).repeat(1, 2)
    cosine, sine = angles.cos(), angles.sin()
    sine[:, : width // 2].neg_()
    slots = torch.tensor(
        [
            own[(n - 1) // PAGE_TOKENS] * PAGE_TOKENS + (n - 1) % PAGE_TOKENS
            for own, n in zip(pages, lengths, strict=True)
        ]
    )

    turned, kept = heads.clone(), layer.clone()
    rotate_(turned[:, : num_heads + num_kv_heads], cosine, sine)
    kept.flatten(0, 1)[slots] = turned[:, num_heads:].unflatten(1, (2, num_kv_heads))
    kernels.rotate_and_write_kv_(heads, cosine, sine, num_kv_heads, layer=layer, slots=slots)
    torch.testing.assert_close(heads, turned, **CLOSE)
    torch.testing.assert_close(layer, kept, **CLOSE)

    contexts = [Decoding(pages, lengths, which) for which in (kernels, None)]
    assert [can_attend(which, layer, FULL) for which in (kernels, None)] == [True, False]
    query = heads[:, :num_heads]
    ours, torchs = (context.attend(query, layer, FULL, scaling=width**-0.5) for context in contexts)
    torch.testing.assert_close(ours, torchs, **CLOSE)
    apart = query.transpose(0, 1).contiguous().transpose(0, 1)  # as transformers lays them out
    assert torch.equal(contexts[0].attend(apart, layer, FULL, scaling=width**-0.5), ours)
    forgotten = Decoding(pages, [max(1, n - 1) for n in lengths], kernels)  # the twin
    assert (forgotten.attend(query, layer, FULL, scaling=width**-0.5) - torchs)[1:].abs().amax(dim=(1, 2)).min() > 1e-3


def test_a_sequence_does_not_depend_on_others_nor_on_threads(kernels):
    """Nor on what is in a page behind its last token."""
    lengths, threads = [70, 1, 16, 47, 5], torch.get_num_threads()
    cache = KVCache({0: (3, 64)}, num_tokens=256, like=torch.zeros(0))
    layer = cache.layers[0].copy_(drawn(*cache.layers[0].shape, seed=3))
    pages = [[7, 2, 9, 4, 1], [12], [6], [3, 5, 11], [8]]
    query = drawn(5, 9, 64, seed=4)

    def attended(rows: slice, num_threads: int) -> Tensor:
        try:
            torch.set_num_threads(num_threads)
            return Decoding(pages[rows], lengths[rows], kernels).attend(query[rows], layer, FULL, scaling=0.125)
        finally:
            torch.set_num_threads(threads)

    together = attended(slice(None), 2)
    for own, n in zip(pages, lengths, strict=True):
        layer[own[-1], (n - 1) % PAGE_TOKENS + 1 :] = torch.nan
    for num_threads in (1, 3, 7, 20):
        assert torch.equal(attended(slice(None), num_threads), together), num_threads
        for row in range(5):
            assert torch.equal(attended(slice(row, row + 1), num_threads)[0], together[row]), (num_threads, row)
    lengths[3] += 1  # the twin: one looks behind its last token
    changed = attended(slice(None), 2)
    assert [torch.equal(changed[row], together[row]) for row in range(5)] == [True, True, True, False, True]


def test_one_head_as_transformers_lays_it_out(kernels):
    """torch calls its strides contiguous whatever they are."""
    cache = KVCache({0: (1, 64)}, num_tokens=64, like=torch.zeros(0))
    layer, query = (
        cache.layers[0].copy_(drawn(*cache.layers[0].shape, seed=3)),
        drawn(1, 20, 64, seed=4).transpose(0, 1),
    )
    prompt = prompts_of([([1, 2], 0, 20)], kernels, CPU)
    alike = prompt.attend(query.clone(memory_format=torch.contiguous_format), query, layer, FULL, scaling=0.125)
    assert torch.equal(prompt.attend(query, query, layer, FULL, scaling=0.125), alike)


@pytest.mark.parametrize("page_tokens", [5, 24])
def test_prompts_with_scores_far_apart_and_pages_of_any_size(kernels, page_tokens):
    layer, query = drawn(20, page_tokens, 2, 2, 64, seed=3), drawn(60, 6, 64, seed=4) * 100
    pages = torch.arange(1, 13)[None].contiguous()
    out = kernels.attend_to_prompts(query, layer, pages, torch.tensor([(0, 60, 0)]), scaling=0.125)
    kept = layer[pages[0]].flatten(0, 1)[:60]  # [L, 2, K, D]
    key, value = (kept[:, i].transpose(0, 1).repeat_interleave(3, dim=0) for i in (0, 1))
    right = functional.scaled_dot_product_attention(query.transpose(0, 1), key, value, scale=0.125, is_causal=True)
    torch.testing.assert_close(out, right.transpose(0, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("page_tokens", [5, 24])
def test_attention_with_scores_far_apart_and_pages_of_any_size(kernels, page_tokens):
    layer, query = drawn(20, page_tokens, 2, 2, 64, seed=3), drawn(3, 6, 64, seed=4) * 100
    lengths, pages = [60, 1, page_tokens + 1], torch.arange(1, 13).expand(3, 12).contiguous()
    out = kernels.attend_to_pages(query, layer, pages, torch.tensor(lengths), scaling=0.125)
    for row, length in enumerate(lengths):
        kept = layer[pages[row]].flatten(0, 1)[:length]  # [L, 2, K, D]
        key, value = (kept[:, i].transpose(0, 1).repeat_interleave(3, dim=0) for i in (0, 1))
        right = functional.scaled_dot_product_attention(query[row, :, None], key, value, scale=0.125)[:, 0]
        torch.testing.assert_close(out[row], right, rtol=1e-4, atol=1e-4)


def pieces_of(pages: list[list[int]], befores: list[int], counts: list[int]) -> list[tuple[list[int], int, int]]:
    return list(zip(pages, befores, counts, strict=True))


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "width"), [(9, 3, 64), (4, 4, 16), (10, 1, 48), (5, 1, 512)])
def test_attention_of_prompts(kernels, num_heads, num_kv_heads, width):
    """Whole prompts and pieces of others, over many pages and more queries than are computed at once."""
    like = torch.zeros(0)
    cache = KVCache({0: (num_kv_heads, width)}, num_tokens=1024, like=like)
    befores, counts = [0, 0, 37, 100], [5, 90, 2, 33]
    pages = [[7], [2, 9, 1, 12, 6, 30], [4, 8, 3], [3, 5, 11, 13, 14, 15, 16, 17, 18]]
    layer = cache.layers[0]
    for own, before, count in pieces_of(pages, befores, counts):
        for place in range(before + count):
            layer[own[place // PAGE_TOKENS], place % PAGE_TOKENS] = drawn(2, num_kv_heads, width, seed=place)
    query = drawn(sum(counts), num_heads + 3, width, seed=4)[:, :num_heads]  # among other heads
    new = [range(before, before + count) for before, count in zip(befores, counts, strict=True)]
    key_value = torch.stack(
        [layer[own[i // PAGE_TOKENS], i % PAGE_TOKENS] for own, rows in zip(pages, new, strict=True) for i in rows]
    )
    contexts = [prompts_of(pieces_of(pages, befores, counts), which, CPU) for which in (kernels, None)]
    assert [can_attend(which, layer, FULL) for which in (kernels, None)] == [True, False]
    ours, torchs = (context.attend(query, key_value, layer, FULL, scaling=width**-0.5) for context in contexts)
    torch.testing.assert_close(ours, torchs, **CLOSE)
    apart = query.transpose(0, 1).contiguous().transpose(0, 1)  # as transformers lays them out
    assert torch.equal(contexts[0].attend(apart, key_value, layer, FULL, scaling=width**-0.5), ours)
    forgotten = prompts_of(pieces_of(pages, [*befores[:-1], 99], counts), kernels, CPU)  # the twin: one too few
    assert (forgotten.attend(query, key_value, layer, FULL, scaling=width**-0.5) - torchs)[-33:].abs().amax() > 1e-3


def test_a_prompts_token_does_not_depend_on_others_nor_on_threads(kernels):
    """Nor on the piece that it comes in, nor on what is behind its prompt's last."""
    length, threads, layer = 150, torch.get_num_threads(), drawn(20, PAGE_TOKENS, 2, 3, 64, seed=3)
    cache = KVCache({0: (3, 64)}, num_tokens=19 * PAGE_TOKENS, like=torch.zeros(0))
    layer = cache.layers[0].copy_(layer)
    pages, query = [7, 2, 9, 4, 1, 12, 6, 3, 5, 11], drawn(length, 9, 64, seed=4)

    def attended(first: int, end: int, num_threads: int) -> Tensor:
        try:
            torch.set_num_threads(num_threads)
            context = prompts_of([(pages, first, end - first)], kernels, CPU)
            return context.attend(query[first:end], query, layer, FULL, scaling=0.125)
        finally:
            torch.set_num_threads(threads)

    whole = attended(0, length, 2)
    layer[pages[-1], (length - 1) % PAGE_TOKENS + 1 :] = torch.nan
    for first, end, num_threads in ((0, 150, 1), (0, 150, 7), (40, 150, 2), (33, 34, 3), (149, 150, 1)):
        assert torch.equal(attended(first, end, num_threads), whole[first:end]), (first, end, num_threads)
    layer[pages[0], 0, 0] += 1  # the twin: who sees the first token sees that
    assert not torch.equal(attended(149, 150, 1), whole[149:])


@pytest.mark.parametrize("width", [24, 528])
def test_heads_that_the_registers_do_not_fit_are_left_to_torch(kernels, width):
    cache = KVCache({0: (1, width)}, num_tokens=64, like=torch.zeros(0))
    assert not can_attend(kernels, cache.layers[0], FULL)


def test_windows_are_left_to_torch(kernels):
    layer = KVCache({0: (1, 64)}, num_tokens=64, like=torch.zeros(0)).layers[0]
    assert [can_attend(kernels, layer, kind) for kind in (FULL, SlidingAttention(1, 1, 8))] == [True, False]


RANKS, WIDTHS = (5, 16, 6), (40, 7, 300)  # 27 ranks: no whole number of fours


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def factors(request, float_factors):
    return float_factors.to(request.param)


@pytest.fixture(scope="module", params=[True, False], ids=["one output", "an output each"])
def float_factors(request):
    """Of three slots and three layers, or two."""
    if not request.param:
        return gate_and_up()
    return side_by_side(slots=3, widths=WIDTHS)


def side_by_side(*, slots: int, widths: tuple[int, ...]) -> Factors:
    blocks = [drawn(slots, rank, width, seed=width) for rank, width in zip(RANKS, widths, strict=True)]
    joined, segments, row, column = torch.zeros(slots, sum(RANKS), sum(widths)), [], 0, 0
    for block in blocks:
        _, rank, width = block.shape
        joined[:, row : row + rank, column : column + width] = block
        segments.append(Segment(0, row, rank, column, width))
        row, column = row + rank, column + width
    return Factors(drawn(slots, sum(RANKS), 70, seed=6), (joined,), tuple(segments))


def gate_and_up(ranks: tuple[int, int] = (5, 16)) -> Factors:
    width = 300
    blocks = tuple(drawn(3, rank, width, seed=rank) for rank in ranks)
    return Factors(
        drawn(3, sum(ranks), 70, seed=6),
        blocks,
        tuple(Segment(i, 0, rank, 0, width) for i, rank in enumerate(ranks) if rank),
    )


def wanted(factors: Factors, slot: int, x: torch.Tensor) -> list[torch.Tensor]:
    factors = factors.to(torch.float32)
    parts = (x @ factors.a[slot].t()).split([bt.shape[1] for bt in factors.bt], dim=1)
    return [part @ bt[slot] for part, bt in zip(parts, factors.bt, strict=True)]


def zeros(factors: Factors) -> list[Layers]:
    """Layers that leave what the adapters add."""
    return [Layers.packed(torch.zeros(bt.shape[2], factors.a.shape[2]), None) for bt in factors.bt]


def packed(factors: Factors) -> Factors:
    """As a slab holds them."""
    blocks = tuple(torch.stack([in_blocks(own) for own in bt]) for bt in factors.bt)
    return Factors(factors.a, blocks, factors.segments)


def adapters_of(*slabs: tuple[Factors, list[tuple[int, int, int]]]) -> AdaptersArray:
    spans = [
        (Place(slab, slot), start, count)
        for slab, own in ((Slab(number, {"g": packed(factors)}, 0), own) for number, (factors, own) in enumerate(slabs))
        for slot, start, count in own
    ]
    runs = StepRuns(spans, torch.device("cpu"), with_kernels=True)
    KEPT.append(runs)
    adapters = runs.adapters("g")
    assert adapters is not None
    return adapters


KEPT = []  # what structs point to


def added(kernels, factors: Factors, spans: list[tuple[int, int, int]], x: torch.Tensor) -> list[torch.Tensor]:
    adapters = adapters_of((factors, spans))
    return [kernels.linear(layer, x, adapters=adapters, output=number) for number, layer in enumerate(zeros(factors))]


SPANS = [(2, 0, 1), (0, 1, 4), (1, 7, 5), (0, 5, 1)]


@pytest.mark.parametrize("number", [4, 3], ids=["an even number", "an odd number"])
def test_adapters_of_a_slab(kernels, factors, number):
    x = drawn(12, 70, seed=7)
    outs = added(kernels, factors, SPANS[:number], x)
    for slot, rows in ((2, slice(0, 1)), (0, slice(1, 6 if number == 4 else 5)), (1, slice(7, 12))):
        for out, right in zip(outs, wanted(factors, slot, x[rows]), strict=True):
            torch.testing.assert_close(out[rows], right, rtol=1e-4, atol=1e-4)
    assert all((out[6] == 0).all() for out in outs)  # nobody's row
    with pytest.raises(AssertionError):  # the twin
        torch.testing.assert_close(outs[0][:1], wanted(factors, 1, x[:1])[0], rtol=1e-4, atol=1e-4)


def test_an_adapter_for_every_row_and_three_layers_in_a_block(kernels):
    """As many pieces as a thread has room for, and the rows behind those that it computes at a time."""
    factors, x = side_by_side(slots=70, widths=(10, 7, 300)), drawn(70, 70, seed=8)
    out = added(kernels, factors, [(slot, slot, 1) for slot in range(70)], x)[0]
    for row in range(70):
        right = wanted(factors, row, x[row : row + 1])[0]
        torch.testing.assert_close(out[row : row + 1], right, rtol=1e-4, atol=1e-4)


def test_adapters_and_the_gated_product_at_once(kernels):
    factors, x = gate_and_up(), drawn(6, 70, seed=8)
    spans = [(1, 0, 2), (2, 3, 3)]  # row 2 is nobody's
    layers = [Layers.packed(drawn(300, 70, seed=seed), drawn(300, seed=seed)) for seed in (9, 10)]
    adapters = adapters_of((factors, spans))
    auth, up = (kernels.linear(layer, x, adapters=adapters, output=n) for n, layer in enumerate(layers))
    assert torch.equal(
        kernels.linear(layers[0].beside(layers[1]), x, adapters=adapters),
        torch.stack([gated_product(kernels, *rows) for rows in zip(auth, up, strict=True)]),
    )


@pytest.mark.parametrize("width", [1, 31, 32, 33, 300])
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 16, 150])
def test_a_linear_layer(kernels, rows, width):
    weight, bias, x = drawn(width, 70, seed=1), drawn(width, seed=2), drawn(rows, 70, seed=3)
    residual = drawn(rows, width, seed=4)
    right = functional.linear(x, weight, bias) + residual
    torch.testing.assert_close(kernels.linear(Layers.packed(weight, bias), x, residual=residual), right, **CLOSE)


def test_a_norm_before_linear_layers(kernels, float_factors):
    """The same numbers, bit for bit, as of a norm apart: also what adapters and the gated product are made of."""
    x, norm = drawn(9, 70, seed=8) * 3, RmsNorm(drawn(70, seed=7), 1e-5)
    normed = kernels.rms_norm(x, norm)
    torch.testing.assert_close(normed, norm(x), **CLOSE)
    width = float_factors.bt[0].shape[2]
    layers = [Layers.packed(drawn(width, 70, seed=seed), None) for seed in (1, 2)]
    both = layers[0].beside(layers[1]) if len(float_factors.bt) == 2 else layers[0]
    adapters = adapters_of((float_factors, [(0, 1, 3), (2, 5, 1)]))
    together = kernels.linear(both, x, norm=norm, adapters=adapters)
    assert torch.equal(together, kernels.linear(both, normed, adapters=adapters))
    assert not torch.equal(together, kernels.linear(both, x, adapters=adapters))  # the twin


def test_long_sums_are_about_as_exact_as_torchs(kernels):
    weight, x = drawn(40, 8192, seed=1), drawn(3, 8192, seed=2)
    exact = functional.linear(x.double(), weight.double())
    ours, torchs = kernels.linear(Layers.packed(weight, None), x), functional.linear(x, weight)
    assert (ours - exact).abs().max() < 8 * (torchs - exact).abs().max()  # one sum after the other, torch has several


def few_ranks(factors: Factors) -> Factors:
    """Of the same layers, two ranks in each output."""
    outputs = [Segment(number, 0, 2, 0, bt.shape[2]) for number, bt in enumerate(factors.bt)]
    blocks = tuple(drawn(3, 2, bt.shape[2], seed=12) for bt in factors.bt)
    return Factors(drawn(3, 2 * len(blocks), 70, seed=13), blocks, tuple(outputs))


def test_slabs_of_two_ranks_in_one_multiplication(kernels, factors):
    others = few_ranks(factors)
    x = drawn(5, 70, seed=11)
    both = adapters_of((factors, [(1, 0, 2)]), (others, [(2, 2, 1), (0, 4, 1)]))
    for number, layer in enumerate(zeros(factors)):
        out = kernels.linear(layer, x, adapters=both, output=number)
        torch.testing.assert_close(out[:2], wanted(factors, 1, x[:2])[number], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(out[2:3], wanted(others, 2, x[2:3])[number], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(out[4:], wanted(others, 0, x[4:])[number], rtol=1e-4, atol=1e-4)
        assert (out[3] == 0).all()


def test_a_row_does_not_depend_on_others_nor_on_threads(kernels, factors):
    """Rows of an engine step: spans over the 64 rows that a thread takes at a time, a bias, a residual."""
    x, threads = drawn(150, 70, seed=8), torch.get_num_threads()
    norm = RmsNorm(drawn(70, seed=7), 1e-5)
    for output, bt in enumerate(factors.bt):
        width = bt.shape[2]
        layer = Layers.packed(drawn(width, 70, seed=1), drawn(width, seed=2))
        residual = drawn(150, width, seed=3)
        adapters = adapters_of((factors, [(0, 3, 70), (2, 73, 60)]))
        together = kernels.linear(layer, x, residual=residual, adapters=adapters, output=output)
        normed = kernels.linear(layer, x, norm=norm, residual=residual, adapters=adapters, output=output)
        for row, slot in ((2, None), (3, 0), (64, 0), (72, 0), (73, 2), (131, 2), (149, None)):
            own = None if slot is None else adapters_of((factors, [(slot, 0, 1)]))
            one = slice(row, row + 1)
            try:
                torch.set_num_threads(1)
                alone = kernels.linear(layer, x[one], residual=residual[one], adapters=own, output=output)
                assert torch.equal(alone[0], together[row]), row
                alone = kernels.linear(layer, x[one], norm=norm, residual=residual[one], adapters=own, output=output)
                assert torch.equal(alone[0], normed[row]), row
            finally:
                torch.set_num_threads(threads)
        others = adapters_of((factors, [(0, 3, 71), (2, 74, 59)]))  # the twin: one row has the other adapter
        assert not torch.equal(kernels.linear(layer, x, residual=residual, adapters=others, output=output), together)


def test_an_output_that_adapters_leave_as_it_is(kernels):
    """Adapters of up_proj alone have no row for gate_proj."""
    factors = gate_and_up(ranks=(0, 16))
    layer, x = Layers.packed(drawn(300, 70, seed=9), None), drawn(2, 70, seed=8)
    adapters = adapters_of((factors, [(1, 0, 2)]))
    auth, up = (kernels.linear(layer, x, adapters=adapters, output=output) for output in (0, 1))
    assert torch.equal(auth, kernels.linear(layer, x))
    torch.testing.assert_close(up - auth, wanted(factors, 1, x)[1], rtol=1e-3, atol=1e-3)


def test_without_a_compiler_there_are_none(monkeypatch, tmp_path):
    monkeypatch.setattr(cpu_kernels.shutil, "which", lambda name: None)
    assert cpu_kernels.compiled.__wrapped__() is None
    monkeypatch.setattr(cpu_kernels.shutil, "which", lambda name: "/bin/false")  # a compiler that fails
    monkeypatch.setattr(cpu_kernels, "cache_directory", lambda: tmp_path)
    assert cpu_kernels.compiled.__wrapped__() is None
    assert list(tmp_path.rglob("*.so")) == []


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists(), reason="Linux with huge pages")
def test_slots_and_weights_are_in_huge_pages():
    """Asked for, on memory that can have them; whether some are free is the machine's."""
    for memory in (empty_bytes(8 * 2**20, torch.device("cpu")), HugePages().floats(2100)):
        assert "hg" in flags_of(memory)
        assert "sh" not in flags_of(memory), "shared memory has none"
    assert "hg" not in flags_of(torch.zeros(8 * 2**20, dtype=torch.uint8))  # the twin


def test_tensors_side_by_side():
    """In few blocks, each at a line of the cache of its own; one as large as a block beside them."""
    pages, sizes = HugePages(), [15, 7, BLOCK_BYTES // 4, 2]
    tensors = [pages.floats(size).fill_(number) for number, size in enumerate(sizes)]
    assert [(len(t), t.min(), t.max()) for t in tensors] == [(size, n, n) for n, size in enumerate(sizes)]
    assert all(t.data_ptr() % 64 == 0 for t in tensors)
    blocks = [t.untyped_storage().data_ptr() for t in tensors]
    assert blocks[0] == blocks[1] == blocks[3] != blocks[2]


def test_a_block_lives_as_long_as_its_tensors():
    first, second = (lambda pages: (pages.floats(70), pages.floats(70)))(HugePages())
    place = first.data_ptr()
    del first
    assert is_mapped(place), "the second is in the same block"
    del second
    gc.collect()
    assert not is_mapped(place)


def is_mapped(place: int) -> bool:
    found = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) ", Path("/proc/self/maps").read_text(), re.MULTILINE)
    return any(int(first, 16) <= place < int(end, 16) for first, end in found)


def test_what_is_fetched_ahead_changes_nothing(kernels):
    """Also at the end of a call, of a layer with more or fewer inputs."""
    for width, after in ((300, 64), (64, 1000), (40, 16)):
        one = Layers.packed(drawn(width, 70, seed=1), None)
        pair = one.beside(Layers.packed(drawn(width, 70, seed=4), None))
        for layers, rows in itertools.product((one, pair), (1, 5, 40, 150)):
            x = drawn(rows, 70, seed=3)
            layers.following = None
            alone = kernels.linear(layers, x)
            layers.following = Layers.packed(drawn(50, after, seed=2), None)
            assert torch.equal(kernels.linear(layers, x), alone)


def test_adapters_that_are_fetched_ahead_change_nothing(kernels, factors):
    """More than the call has time for, and fewer; of two slabs, an odd number of rows, an output without any."""
    own, x = adapters_of((factors, [(0, 0, 2), (2, 2, 3)])), drawn(5, 70, seed=3)
    following = Layers.packed(drawn(50, 70, seed=2), None)
    for number, layers in enumerate(zeros(factors)):
        layers.following = following.beside(following)
        alone = kernels.linear(layers, x, adapters=own, output=number)
        for after in (
            adapters_of((factors, [(1, 0, 5)])),
            adapters_of((factors, [(slot, slot, 1) for slot in range(3)]), (gate_and_up(ranks=(0, 13)), [(1, 3, 2)])),
        ):
            fetched = kernels.linear(layers, x, adapters=own, output=number, next_adapters=after)
            assert torch.equal(fetched, alone)


def flags_of(memory: torch.Tensor) -> list[str]:
    """Of the mapping that the middle of it lies in (proc_pid_smaps(5))."""
    place, inside = memory.data_ptr() + len(memory) // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= place < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError("no such mapping")
