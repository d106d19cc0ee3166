"""`ftray plan` against measured peaks of the same settings (docs/explanation/plan.md; all: memory.py)."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from memory import CASES, measure, planned, write_model

WITHIN = 0.15
MEASURED = ["full-z2", "full-z3-2-ranks", "lora-z2-checkpointed"]


@pytest.fixture(scope="module")
def peaks(tmp_path_factory):
    scratch = tmp_path_factory.mktemp("memory")
    base = write_model(scratch / "model")
    with ThreadPoolExecutor(max_workers=2) as pool:  # a rank has one thread
        found = pool.map(lambda name: measure(*CASES[name], base, scratch / f"{name}.pt"), MEASURED)
        return base, dict(zip(MEASURED, found, strict=True))


@pytest.mark.parametrize("name", MEASURED)
def test_planned_memory_is_what_a_worker_needs(peaks, name):
    base, measured = peaks
    assert planned(*CASES[name], base).total == pytest.approx(measured[name], rel=WITHIN)


def test_a_plan_of_other_settings_is_found_out(peaks):
    base, measured = peaks
    world_size, settings = CASES["lora-z2-checkpointed"]
    without = {key: value for key, value in settings.items() if key != "memory.activation_checkpointing"}
    assert planned(world_size, without, base).total != pytest.approx(measured["lora-z2-checkpointed"], rel=WITHIN)
    assert planned(*CASES["full-z2-2-ranks"], base).total != pytest.approx(measured["full-z2"], rel=WITHIN)
