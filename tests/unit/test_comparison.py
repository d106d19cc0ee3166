"""Ways compared, each at its own best point: who is found, what is said, and what is doubted."""

import pytest
from tiny import RUN_OF_SWEEPS

from ftray.config import load_sweep
from ftray.errors import ConfigError
from ftray.evaluate.scores import Score
from ftray.storage import write_json
from ftray.sweep.compare.comparison import BASE, Alone, is_measured, note_measured, read_comparison
from ftray.sweep.report.report import comparison_table, write_sweep_report
from ftray.sweep.study import Study
from ftray.sweep.trials import Report

SWEEP = """
kind: sweep
name: s
run: {run}
space:
  adapter: [null, {{rank: 64}}, {{rank: 1}}]
  variables.rate: {{log_uniform: [1e-5, 1e-3], points: 3}}
  optimizer.learning_rate: {{expression: variables.rate if adapter == null else 10 * variables.rate}}
seeds: 3
search: {{algorithm: grid}}
compare: {{key: {key}}}
"""
METRIC = {None: 1.0, 64: 1.005, 1: 1.3}


@pytest.fixture
def load(tmp_path):
    (tmp_path / "run.yaml").write_text(RUN_OF_SWEEPS)

    def load(key: str = "adapter"):
        (tmp_path / "sweep.yaml").write_text(SWEEP.format(run=tmp_path / "run.yaml", key=key))
        return load_sweep(tmp_path / "sweep.yaml")

    return load


def play(study: Study, *, best_rate: float = 1e-4, spread: float = 0.001) -> None:
    while (run := study.next_run()) is not None:
        point = study.trials[run.trial].point
        rank = point["adapter"] and point["adapter"]["rank"]
        value = METRIC[rank] + 0.5 * (point["variables.rate"] != best_rate) + spread * (run.seed - 1)
        study.report(run.name, Report(40, value, 100, 1.0))
        study.end(run.name, "finished")


def test_each_way_stands_at_its_own_best_point(load, tmp_path):
    study = Study(*load(), tmp_path)
    play(study)
    full, wide, narrow = read_comparison(study, tmp_path).methods
    assert [method.best.name for method in (full, wide, narrow)] == ["t001", "t004", "t007"]
    assert (full.rate, wide.rate) == pytest.approx((1e-4, 1e-3))
    assert full.deviation == pytest.approx(0.001)
    assert full.at_edge == ()


def test_what_is_as_good_and_what_is_worse(load, tmp_path):
    """Within 1% of the metric, or within two standard deviations over the seeds."""
    study = Study(*load(), tmp_path)
    play(study)
    wide, narrow = read_comparison(study, tmp_path).verdicts()
    assert "1.0050 against 1.0000 (+0.5%, +5.0 standard deviations over seeds), as good as adapter null" in wide
    assert "best optimizer.learning_rate is 10 times as high" in wide
    assert "(+30.0%, +300.0 standard deviations over seeds), worse than adapter null" in narrow


def test_noise_beyond_the_difference_and_a_best_at_the_edge_are_told(load, tmp_path):
    study = Study(*load(), tmp_path)
    play(study, best_rate=1e-3, spread=0.2)
    reported = read_comparison(study, tmp_path).verdicts()
    assert "+1.5 standard deviations over seeds), not told apart from adapter null" in reported[1]
    assert sum("variables.rate is the last that was tried: try more" in line for line in reported) == 3


def test_of_a_metric_that_is_to_be_high_more_is_better(load, tmp_path):
    config, space = load()
    search = config.search.model_copy(update={"mode": "max"})
    study = Study(config.model_copy(update={"search": search}), space, tmp_path)
    play(study, best_rate=0.0)
    assert read_comparison(study, tmp_path).verdicts()[1].split(", ")[-1].startswith("better than adapter null")


def test_a_clone_beside_the_space_is_another_way(load, tmp_path):
    """With more steps it has an unfair chance; with another rate it counts."""
    study = Study(*load(), tmp_path)
    play(study)
    for name, changes in (("t001", {"max_steps": 80}), ("t001", {"optimizer.learning_rate": 3e-5})):
        study.clone(name, changes)
        run = study.next_run()
        value = 0.1 if "max_steps" in changes else 0.5
        while run is not None:
            study.report(run.name, Report(40, value, 100, 1.0))
            study.end(run.name, "finished")
            run = study.next_run()
    full = read_comparison(study, tmp_path).methods[0]
    assert full.best.name == "t010"
    assert full.rate == pytest.approx(3e-5)


def test_a_product_that_cannot_be_scored_is_told(load, tmp_path):
    study = Study(*load(), tmp_path)
    play(study)
    first, second, _ = (run.name for run in study.trials[4].runs)
    note_measured(tmp_path, "scores", {first: Score(None, None, problem="no DoRA here"), second: Score(0.5, 2.0)})
    compared = read_comparison(study, tmp_path)
    assert "adapter {rank: 64}: not scored: no DoRA here" in compared.verdicts()
    assert compared.methods[1].accuracy == 0.5


def test_a_better_way_is_called_better(load, tmp_path, monkeypatch):
    monkeypatch.setitem(METRIC, 64, 0.7)
    study = Study(*load(), tmp_path)
    play(study)
    assert (
        "-300.0 standard deviations over seeds), better than adapter null"
        in read_comparison(study, tmp_path).verdicts()[0]
    )


def test_a_way_of_which_nothing_finished_is_not_judged(load, tmp_path):
    study = Study(*load(), tmp_path)
    while (run := study.next_run()) is not None:
        if study.trials[run.trial].point["adapter"] is None:
            study.end(run.name, "failed", "no memory")
        else:
            study.report(run.name, Report(40, 1.0, 1, 1.0))
            study.end(run.name, "finished")
    compared = read_comparison(study, tmp_path)
    assert compared.verdicts()[0].endswith("no trial with adapter null finished")
    assert comparison_table(compared).rows[0][1] == "none finished"


def test_the_table_tells_what_was_gained_and_what_was_broken(load, tmp_path):
    study = Study(*load(), tmp_path)
    play(study)
    assert not is_measured(study, tmp_path)
    names = [run.name for trial in (1, 4, 7) for run in study.trials[trial].runs]
    note_measured(tmp_path, "scores", {BASE: Score(0.1, 3.0)})
    note_measured(tmp_path, "scores", {name: Score(0.9, 3.25) for name in names})
    note_measured(tmp_path, "alone", {name: Alone(120.4, 2.5) for name in ("t001", "t004")})
    assert not is_measured(study, tmp_path)  # one is missing
    note_measured(tmp_path, "alone", {"t007": Alone(240.0, 1.25)})
    assert is_measured(study, tmp_path)
    table = comparison_table(read_comparison(study, tmp_path))
    assert table.rows[0] == ["the base, untuned", "", "", "", "", "10.0%", "3.0000", "", ""]
    assert table.rows[2][0] == "{rank: 64}"
    assert table.rows[1][-4:] == ["90.0%", "3.2500 (+0.2500)", "120", "2.50"]
    write_json(tmp_path / "environment.json", {"packages": {"torch": "2"}})
    page = write_sweep_report(study, tmp_path).read_text()
    assert "3.2500 (+0.2500)" in page
    assert "as good as adapter null" in page


@pytest.mark.parametrize(
    ("written", "unequal", "reported"),
    [
        ("search: {{algorithm: grid}}", "search: {{algorithm: tpe, trials: 9}}", "tpe seldom tries what looks worse"),
        ("search: {{algorithm: grid}}", "search: {{algorithm: grid, scheduler: asha}}", "asha stops what learns late"),
        (
            "search: {{algorithm: grid}}",
            "search: {{algorithm: grid, budget: {{steps: 9}}}}",
            "it may be spent",
        ),
        ("space:", "space:\n  base_model: [a, b]", "losses under different tokenizers"),
    ],
)
def test_what_would_not_be_searched_alike_is_not_compared(load, monkeypatch, written, unequal, reported):
    monkeypatch.setattr("test_comparison.SWEEP", SWEEP.replace(written, unequal))
    with pytest.raises(ConfigError, match=reported):
        load()


def test_what_is_compared_must_be_a_list_of_choices(load):
    for key in ("adapter.rank", "variables.rate", "optimizer.learning_rate"):
        with pytest.raises(ConfigError, match="is no list of choices in the space; the space has adapter"):
            load(key)
