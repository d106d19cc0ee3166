"""`jobs/bench.py check` and `jobs/loss_compare.py` find what they are there to find."""

import json

import pytest
from jobs_modules import job

bench, loss_compare = job("bench"), job("loss_compare")
KEPT = {
    "bench": "serve",
    "ratios_of_tokens_per_s": {
        "serve_ftray_base / serve_transformers": 3.0,
        "serve_ftray_adapters / serve_ftray_base": 0.93,
        "serve_ftray_base / serve_ftray_adapters": 1.08,  # more of it is not better
    },
    "median": {"serve_ftray_base": {"peak_gib": 2.0}, "serve_transformers": {"peak_gib": 2.0}},
}


@pytest.mark.parametrize(
    ("changes", "worse"),
    [
        ({}, []),
        ({"serve_ftray_base / serve_transformers": 2.6}, []),
        ({"serve_ftray_base / serve_transformers": 2.5}, ["serve_ftray_base / serve_transformers"]),
        ({"serve_ftray_adapters / serve_ftray_base": 0.78}, ["serve_ftray_adapters / serve_ftray_base"]),
        ({"serve_ftray_base / serve_ftray_adapters": 0.8}, []),
    ],
)
def test_a_ratio_that_fell_too_far_is_found(changes, worse):
    new = KEPT | {"ratios_of_tokens_per_s": KEPT["ratios_of_tokens_per_s"] | changes}
    assert [line.partition(":")[0] for line, is_worse in bench.compare(KEPT, new) if is_worse] == worse


@pytest.mark.parametrize(
    ("side", "peak", "worse"), [("base", 2.09, False), ("base", 2.11, True), ("other", 9.0, False)]
)
def test_memory_that_grew_too_much_is_found(side, peak, worse):
    name = {"base": "serve_ftray_base", "other": "serve_transformers"}[side]
    new = KEPT | {"median": KEPT["median"] | {name: {"peak_gib": peak}}}
    assert any(is_worse for _, is_worse in bench.compare(KEPT, new)) == worse


def test_every_pair_that_is_guarded_is_measured_and_kept():
    for name, pairs in bench.PAIRS.items():
        kept = json.loads((bench.OUT / f"{name}.json").read_text())
        assert {f"{a} / {b}" for a, b in pairs} <= bench.guarded(kept).keys()
    assert {"train", "serve", "sweep", "long"} <= set(bench.baselines())


def test_a_bench_without_a_report_is_refused(capsys):
    assert bench.check(["trian"], turns=1, threads=1) == 2
    assert "trian: no kept report; there are train" in capsys.readouterr().err


def test_losses_that_differ_are_found():
    steps = [{"loss": 6.25, "grad_norm": 2.0}, {"loss": 5.5, "grad_norm": 1.5}]
    moved = [steps[0], {"loss": 5.5 * (1 + 1e-6), "grad_norm": 1.5}]
    assert loss_compare.differences(steps, steps, rtol=0.0) == []
    assert loss_compare.differences(steps, moved, rtol=1e-5) == []
    assert "step 2: loss 5.5 and" in loss_compare.differences(steps, moved, rtol=0.0)[0]
    assert loss_compare.differences(steps, steps[:1], rtol=0.0) == ["a has 2 steps, b has 1"]
    assert loss_compare.differences(steps, [steps[0], {"loss": 5.5, "grad_norm": 1.6}], rtol=1e-3) != []
    broken = [steps[0], {"loss": float("nan"), "grad_norm": 1.5}]
    assert loss_compare.differences(steps, broken, rtol=1.0) != []


def test_a_side_is_a_commit_or_settings():
    assert loss_compare.is_settings("zero.stage=3 workers.count=2")
    assert not loss_compare.is_settings("HEAD~1")
    assert loss_compare.commit_of("no-such-commit") is None
