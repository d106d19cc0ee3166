"""Losses of a few steps of every objective and method are those that are kept: to the last bit on the kind of machine
that made them; to 1e-6 elsewhere (sums in another order), and to 1e-4 with a base in nf4: bitsandbytes rounds what it
multiplies to 16 bits, so that a last bit moves a loss by up to 5e-5 (measured: AVX2's kernels on an AVX-512 chip)."""

import pytest
from cases import machine_kind, read_losses, run_alone, run_fused

KEPT = read_losses()
RTOL, RTOL_NF4 = 1e-6, 1e-4


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    """By name; each way of running is trained when its first case asks for it."""
    made: dict[tuple[str, int], dict[str, list[float]]] = {}

    def of(name: str) -> list[float]:
        way = run_fused if "-fused-" in name else run_alone
        key = (way.__name__, 2 if name.endswith("2-ranks") else 1)
        if key not in made:
            made[key] = way(key[1], tmp_path_factory.mktemp("golden"))
        return made[key][name]

    return of


def check(found: list[float], kept: list[float], *, machine: str, rtol: float = RTOL) -> None:
    if machine == KEPT["made"]["machine"]:
        assert found == kept
    else:
        assert found == pytest.approx(kept, rel=rtol)


@pytest.mark.parametrize("name", KEPT["losses"])
def test_losses_are_the_kept_ones(name, losses):
    rtol = RTOL_NF4 if "-qlora-" in name else RTOL
    check(losses(name), KEPT["losses"][name], machine=machine_kind(), rtol=rtol)


def test_every_objective_and_method_is_kept():
    from cases import METHODS, OBJECTIVES, STAGES

    alone = [f"{o}-{m}-z{s}" for o in OBJECTIVES for m in METHODS for s in STAGES[m]]
    wanted = [*alone, *(f"{o}-fused-{name}" for o in OBJECTIVES for name in ("small", "wide"))]
    assert sorted(KEPT["losses"]) == sorted(f"{name}-{size}" for name in wanted for size in ("1-rank", "2-ranks"))


def test_a_loss_that_differs_is_found():
    kept = [3.25, 2.75]
    check(kept, kept, machine="another")
    for machine, moved in ((KEPT["made"]["machine"], 3.25 + 1e-15), ("another", 3.25 * (1 + 1e-5))):
        with pytest.raises(AssertionError):
            check([moved, 2.75], kept, machine=machine)
