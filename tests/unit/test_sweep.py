"""Sweeps without Ray: the space, the search, who is stopped, and the journal that a sweep goes on from."""

import json
import random
import shlex
from collections import Counter

import pytest
from tiny import RUN_OF_SWEEPS

from ftray.cli.main import main
from ftray.config import load_config, load_sweep
from ftray.config.adapter import AdapterConfig
from ftray.config.domains import Choice, Range, as_yaml, parse_domain
from ftray.config.expression import Expression
from ftray.errors import ConfigError, DataError, NotFoundError
from ftray.model.hardware import choose_hardware
from ftray.storage import write_bytes, write_json
from ftray.sweep.fused.coordinator import MAX_HAND_OUTS, TrialCoordinator
from ftray.sweep.fused.eligibility import fusing_of
from ftray.sweep.fused.group import RowSharing
from ftray.sweep.fused.memory import MemoryBudget
from ftray.sweep.launch import shares
from ftray.sweep.prepare import prepare_sweep
from ftray.sweep.report.plots import cell, heat_map
from ftray.sweep.report.report import LivePage, status_text, train_command, write_sweep_report
from ftray.sweep.report.text import conclusion
from ftray.sweep.search.algorithms import STARTUP_TRIALS
from ftray.sweep.search.importance import importance
from ftray.sweep.search.schedulers import Arrival, Asha, MedianStopping
from ftray.sweep.study import JOURNAL, Study
from ftray.sweep.trials import Progress, Report, SweepRun, Trial

SPACE = """
  adapter.rank: [2, 8]
  adapter.alpha: {expression: 2 * adapter.rank}
  optimizer.learning_rate: {log_uniform: [1e-4, 1e-2], points: 3}
"""


@pytest.fixture
def load(tmp_path):
    run = tmp_path / "run.yaml"
    run.write_text(RUN_OF_SWEEPS)

    def load(search: str = "{algorithm: grid}", *, space: str = SPACE, more: str = "", overrides=()):
        path = tmp_path / "sweep.yaml"
        path.write_text(f"kind: sweep\nname: s\nrun: {run}\n{more}\nspace:{space}\nsearch: {search}\n")
        return load_sweep(path, overrides)

    return load


def study_of(loaded, directory, **more) -> Study:
    return Study(*loaded, directory, **more)


def play(study: Study, value, *, steps=(10, 20, 30, 40), until: int | None = None) -> list[str]:
    """One run after the other; `value(point, step)`. Returns the names in their order."""
    names = []
    while (run := study.next_run()) is not None:
        names.append(run.name)
        for step in steps:
            if until is not None and len(names) == until and step == steps[-1]:
                return names
            report = Report(step, value(study.trials[run.trial].point, step), step * 100, step * 0.5)
            if study.report(run.name, report) is not None:
                study.end(run.name, "stopped")
                break
        else:
            study.end(run.name, "finished")
    return names


# -- expressions and domains ---------------------------------------------------------------------------------------


def test_an_expression_is_a_small_grammar_and_nothing_of_python_beyond_it():
    values = {"adapter.rank": 16, "a": 3, "b": None}
    for text, expected in (
        ("2 * adapter.rank", 32),
        ("-a + 2 ** 3 // 3", -1),
        ("min(adapter.rank, 8) / 4", 2.0),
        ("round(sqrt(a * 3))", 3),
        ("'dora' if adapter.rank >= 16 else 'lora'", "dora"),
        ("5", 5),
        ("1 if b == null else 2", 1),
        ("1 if a == null else 2", 2),
    ):
        assert Expression(text).evaluate(values.__getitem__) == expected
    assert Expression("min(a, b.c) + a if a == null else 0").keys == ["a", "b.c"]
    for text in (
        "__import__('os').system('x')",
        "a.b()",
        "[a]",
        "lambda: 1",
        "a if a",
        "min(a, key=a)",
        "a and a",
        "open('x')",
        "a[0]",
        "f'{a}'",
        "1 < a < 2",
        "",
    ):
        with pytest.raises(ValueError):
            Expression(text)
    with pytest.raises(ValueError, match="beyond 64"):
        Expression("2 ** 999999999").evaluate(values.__getitem__)
    with pytest.raises(ValueError, match="division by zero"):
        Expression("1 / (a - 3)").evaluate(values.__getitem__)


def test_domains_are_read_as_they_are_written_and_refused_with_the_rule():
    for text in (
        [4, None, {"rank": 2}],
        {"log_uniform": [1e-5, 1e-3]},
        {"int_uniform": [1, 9], "points": 3},
        {"expression": "a"},
    ):
        assert as_yaml(parse_domain(text)) == text
    assert parse_domain({"log_uniform": [1e-4, 1e-2], "points": 3}).grid == [1e-4, 1e-3, 1e-2]
    assert parse_domain({"log_int_uniform": [1, 64], "points": 4}).grid == [1, 4, 16, 64]
    assert parse_domain({"uniform": [0, 1], "points": 1}).grid == [0]
    for value, rule in (
        ([], "must not be empty"),
        ([1, 1], "twice"),
        (3, "give a list of choices"),
        ({"uniform": [1, 0]}, "below HIGH"),
        ({"log_uniform": [0, 1]}, "above 0"),
        ({"int_uniform": [0.5, 1]}, "whole numbers"),
        ({"uniform": [0, 1], "log_uniform": [1, 2]}, "give a list"),
        ({"uniform": [0, 1], "step": 2}, "'step' is not understood"),
        ({"uniform": [0, 1], "points": 0}, "from 1 on"),
        ({"uniform": [0, float("inf")]}, "two numbers"),
        ({"expression": "a", "points": 2}, "stands alone"),
    ):
        with pytest.raises(ValueError, match=rule):
            parse_domain(value)


# -- the file ------------------------------------------------------------------------------------------------------


def test_a_grid_has_every_point_and_the_expressions_follow(load):
    config, space = load()
    points = list(space.grid())
    assert len(points) == 6
    run = space.config(points[-1], name="t005", seed=3)
    assert (run.adapter.rank, run.adapter.alpha, run.optimizer.learning_rate) == (8, 16, 1e-2)
    assert (run.name, run.seed, config.seeds) == ("t005", 3, (0,))


def test_of_a_grid_without_end_only_the_trials_that_will_run_are_looked_at(load, tmp_path):
    """2 billion points, of which the second billion would be refused."""
    axes = "".join(f"\n  variables.v{number}: {list(range(10))}" for number in range(9))
    space = f"\n  adapter.dropout: [0, 2]{axes}\n  batch.examples_per_step: {{expression: 1 + variables.v8}}\n"
    study = study_of(load("{algorithm: grid, trials: 10}", space=space), tmp_path)
    assert study.num_planned == 10
    assert len(play(study, lambda point, step: 1.0)) == 10
    with pytest.raises(ConfigError, match=r"adapter\.dropout=2"):
        load("{algorithm: grid, trials: 2}", space="\n  adapter.dropout: [0, 2]\n")


def test_an_expression_may_use_what_the_run_says_or_its_defaults(load):
    space = load(space="\n  optimizer.warmup_steps: {expression: max_steps // adapter.rank}\n  adapter.rank: [4, 8]\n")[
        1
    ]
    assert [space.config(point).optimizer.warmup_steps for point in space.grid()] == [10, 5]
    space = load(space="\n  adapter.alpha: {expression: 3 * adapter.rank}\n  epochs: [null]\n")[1]
    assert [space.config(point).adapter.alpha for point in space.grid()] == [48]


def test_overrides_are_dotted_keys_or_sections_and_the_command_line_sets_them(load):
    more = "overrides: {adapter.dropout: 0.1, optimizer: {weight_decay: 0.5}}"
    _, space = load(more=more, overrides=["overrides.max_steps=20", "overrides.batch.examples_per_step=4"])
    run = space.config(next(space.grid()))
    assert (run.adapter.dropout, run.optimizer.weight_decay, run.max_steps) == (0.1, 0.5, 20)
    assert (run.batch.examples_per_step, run.batch.tokens_per_micro_batch) == (4, 512)


def test_what_is_wrong_with_a_space_is_said_before_anything_starts(load):
    def problems(**how) -> str:
        with pytest.raises(ConfigError) as caught:
            load(**how)
        return str(caught.value)

    assert "adapter.rnak: unknown key; did you mean 'rank'?" in problems(space="\n  adapter.rnak: [1]\n")
    said = problems(space="\n  adapter.rank: [4, 0]\n  adapter.variant: [lora, lorra]\n")
    assert "adapter.rank=0" in said
    assert "greater than 0" in said
    assert "did you mean 'lora'" in said
    assert "did you mean 'adapter'" in problems(space="\n  adaptor.rank: [1]\n")
    assert "cannot be swept: each trial gets its own" in problems(space="\n  name: [a, b]\n")
    assert "cannot be swept: losses on other data" in problems(space="\n  data.eval: [a.jsonl]\n")
    assert "give `seeds`" in problems(space="\n  seed: [1, 2]\n")
    assert "swept as a whole" in problems(space="\n  adapter: [null]\n  adapter.rank: [1]\n")
    assert "need each other" in problems(space="\n  a: {expression: b}\n  b: {expression: a}\n")
    assert "only expressions" in problems(space="\n  adapter.rank: {expression: '4'}\n")
    assert "add `points: 5`" in problems(space="\n  optimizer.learning_rate: {uniform: [0.1, 0.2]}\n")
    assert "a run has no key 'adapter.rnk'" in problems(
        space="\n  adapter.rank: [1]\n  adapter.alpha: {expression: adapter.rnk}\n"
    )
    assert "must be at most batch.tokens_per_micro_batch" in problems(space="\n  data.max_example_tokens: [64, 1024]\n")
    assert "needs an end" in problems(search="{algorithm: tpe}")
    assert "eval_loss needs data.eval" in problems(more="overrides: {data.eval: null}")
    assert "overrides: max_stepz: unknown key" in problems(more="overrides: {max_stepz: 3}")
    assert "seeds" in problems(more="seeds: [1, 1]")
    ends = problems(search="{algorithm: random, trials: 3}", space="\n  adapter.dropout: {uniform: [0, 1.5]}\n")
    assert "adapter.dropout: 1.5 is refused" in ends


# -- search --------------------------------------------------------------------------------------------------------


def test_random_and_tpe_points_are_in_the_space_and_a_function_of_what_was_before(load, tmp_path):
    def quality(point, step):
        return abs(point["adapter.rank"] - 8) + 1 / step

    for algorithm in ("random", "tpe"):
        found = []
        for again in range(2):
            directory = tmp_path / f"{algorithm}{again}"
            directory.mkdir()
            study = study_of(load(f"{{algorithm: {algorithm}, trials: 12}}"), directory)
            play(study, quality)
            found.append([trial.point for trial in study.trials])
        assert found[0] == found[1]
        assert len({json.dumps(point) for point in found[0]}) > 6
        assert all(p["adapter.rank"] in (2, 8) and 1e-4 <= p["optimizer.learning_rate"] <= 1e-2 for p in found[0])
        if algorithm == "tpe":  # it learns; chance would take rank 8 half of the times
            assert sum(p["adapter.rank"] == 8 for p in found[0][STARTUP_TRIALS:]) >= 5


def test_importance_finds_the_key_that_matters(load, tmp_path):
    study = study_of(load("{algorithm: random, trials: 40}"), tmp_path)
    play(study, lambda point, step: point["optimizer.learning_rate"] * 1000, steps=(40,))
    reported = importance(study.trials, study.space, study.config.search)
    assert reported is not None
    assert reported.shares["optimizer.learning_rate"] > 0.8
    assert importance(study.trials[:19], study.space, study.config.search) is None  # too few for an estimate


def test_of_a_grid_the_shares_are_exact(load, tmp_path):
    """2 x 2 losses of a sweep whose bars once said half and half: the rate explains 96%."""
    losses = {(4, 1e-3): 10.55, (8, 1e-3): 10.24, (4, 1e-2): 9.23, (8, 1e-2): 9.03}
    space = " {adapter.rank: [4, 8], optimizer.learning_rate: [1.0e-3, 1.0e-2]}"
    study = study_of(load("{algorithm: grid}", space=space), tmp_path)
    play(study, lambda point, _: losses[point["adapter.rank"], point["optimizer.learning_rate"]])
    found = importance(study.trials, study.space, study.config.search)
    assert found is not None
    rate, rank = found.shares["optimizer.learning_rate"], found.shares["adapter.rank"]
    grid = [[10.55, 9.23], [10.24, 9.03]]
    mean = sum(map(sum, grid)) / 4
    total = sum((value - mean) ** 2 for row in grid for value in row) / 4
    by_rate = [(grid[0][column] + grid[1][column]) / 2 for column in (0, 1)]
    assert rate == pytest.approx(sum((value - mean) ** 2 for value in by_rate) / 2 / total)
    assert rate == pytest.approx(0.96, abs=0.005)
    assert rank == pytest.approx(0.039, abs=0.002)
    assert sum(found.shares.values()) == pytest.approx(1)
    assert importance(study.trials[:3], study.space, study.config.search) is None  # no whole grid


# -- schedulers ----------------------------------------------------------------------------------------------------


def test_asha_lets_the_best_third_of_a_rung_go_on():
    asha = Asha(grace_steps=10, reduction_factor=3)
    assert asha.goes_on(Arrival("a", 5, 9.0))  # before the first rung
    assert asha.goes_on(Arrival("a", 10, 1.0))  # the first of a rung
    assert not asha.goes_on(Arrival("b", 10, 2.0))
    assert asha.goes_on(Arrival("c", 11, 0.5))
    assert asha.goes_on(Arrival("a", 20, 9.0))  # between rungs
    assert asha.goes_on(Arrival("a", 30, 9.0))
    assert asha.goes_on(Arrival("c", 30, 0.4))


def test_asha_judges_together_what_arrives_together():
    """In turns, from the worst to the best, every one would go on."""
    arrivals = [Arrival(str(number), 10, 9.0 - number) for number in range(9)]
    in_turns, together = (Asha(grace_steps=10, reduction_factor=3) for _ in range(2))
    assert all(in_turns.goes_on(arrival) for arrival in arrivals)
    passed = [a.trial for a in arrivals if together.goes_on(a, beside=[other for other in arrivals if other is not a])]
    assert passed == ["6", "7", "8"]
    elsewhere = [Arrival("x", 30, 0.0)]
    assert Asha(grace_steps=10, reduction_factor=3).goes_on(Arrival("y", 10, 5.0), beside=elsewhere)


def test_what_a_group_reports_together_is_judged_so_and_read_again_the_same(load, tmp_path):
    loaded = load("{algorithm: grid, scheduler: asha}")
    study = study_of(loaded, tmp_path)
    names = [study.next_run().name for _ in range(3)]
    reports = {name: Report(10, 3.0 - number, 1, 1.0) for number, name in enumerate(names)}
    stopped = {name for name, reason in study.report_together(reports).items() if reason is not None}
    assert stopped == set(names[:2])
    again = study_of(loaded, tmp_path)
    assert {name for name in names if again.report(name, reports[name]) is not None} == stopped


@pytest.mark.parametrize("together", [True, False], ids=["side by side", "one after the other"])
@pytest.mark.parametrize("scheduler", ["asha", "median"])
def test_seeds_go_on_and_end_with_their_trial(load, tmp_path, scheduler, together):
    """Seed by seed every trial here would lose one, and none could be the best."""
    noise = {(trial, seed): abs(trial - seed) % 3 for trial in range(3) for seed in range(3)}
    study = study_of(load(f"{{algorithm: grid, scheduler: {scheduler}, grace_steps: 10}}", more="seeds: 3"), tmp_path)
    steps = (10, 20, 30, 40)
    if together:
        runs = list(iter(study.next_run, None))
        for step in steps:
            values = {run.name: noise[run.trial % 3, run.seed] - step / 100 for run in runs}
            reported = study.report_together({name: Report(step, value, 1, 1.0) for name, value in values.items()})
            for run in [run for run in runs if reported[run.name] is not None]:
                study.end(run.name, "stopped")
                runs.remove(run)
        for run in runs:
            study.end(run.name, "finished")
    else:
        play(study, lambda point, step: random.Random(json.dumps(point)).random() - step / 100)
    assert study.best is not None
    assert all(len({run.outcome for run in trial.runs}) == 1 for trial in study.trials)
    assert study.is_over


def test_who_shares_slots_takes_none_too_many():
    assert shares(3, 2) == [2, 1]
    assert shares(8, 1) == [8]
    assert shares(4, 4) == [1] * 4


def test_the_page_is_written_anew_at_an_end_and_now_and_then(load):
    written = []
    page = LivePage(lambda: written.append(1), every_s=3600)
    for has_ended, times in ((False, 1), (False, 1), (True, 2), (False, 2)):
        page(has_ended=has_ended)
        assert len(written) == times
    often = LivePage(lambda: written.append(1), every_s=0)
    often(has_ended=False)
    often(has_ended=False)
    assert len(written) == 4


def test_the_one_that_kills_its_group_is_found_and_the_others_finish(load, tmp_path):
    """t003 ends its group's workers before anybody's first report."""
    coordinator = TrialCoordinator(*load("{algorithm: grid}"), tmp_path)
    for _ in range(100):
        members = [json.loads(run)["name"] for run in coordinator.take(0, 4).runs]
        if not members:
            break
        if "t003" in members:
            coordinator.start_over(0)
            continue
        for name in members:
            coordinator.report({name: Report(10, 1.0, 100, 1.0)})
            coordinator.end(name, "finished", None)
    study = Study(*load("{algorithm: grid}"), tmp_path, is_driver=False)
    assert {run.name: run.outcome for run in study.runs} == {
        name: "failed" if name == "t003" else "finished" for name in ("t000", "t001", "t002", "t003", "t004", "t005")
    }


def test_a_search_whose_trials_all_fail_at_once_ends(load, tmp_path):
    """They use up no steps of a budget."""
    loaded = load("{algorithm: random, budget: {steps: 1000}}")
    study = study_of(loaded, tmp_path)
    for _ in range(100):
        if (run := study.next_run()) is None:
            break
        study.end(run.name, "failed", "no such module")
    assert len(study.trials) == 10
    assert study.is_over
    assert study.gave_up is not None
    assert "no such module" in study.gave_up
    assert study_of(load("{algorithm: random, trials: 12}"), tmp_path).next_run() is not None  # as a user asks


def test_the_other_seeds_of_a_trial_that_failed_end(load, tmp_path):
    loaded = load(more="seeds: 3")
    study = study_of(loaded, tmp_path)
    first, second = study.next_run(), study.next_run()
    assert first is not None
    assert second is not None
    study.end(first.name, "diverged", "nan")
    assert study.report(second.name, Report(10, 1.0, 100, 1.0)) == f"{first.name} of its trial diverged"
    again = study_of(loaded, tmp_path)  # read again it knows as much
    for known in (study, again):
        assert known.report(second.name, Report(20, 1.0, 200, 2.0)) is not None
    study.end(second.name, "stopped")
    assert study.next_run().trial == 1  # pyright: ignore
    assert [run.outcome for run in study.trials[0].runs] == ["diverged", "stopped", "stopped"]


def test_whole_numbers_of_a_range_have_the_same_share(load):
    space = load("{algorithm: random, trials: 1}", space="\n  adapter.rank: {int_uniform: [1, 4]}\n")[1]
    chance = random.Random(0)
    counts = Counter(space.sample(chance)["adapter.rank"] for _ in range(4000))
    assert sorted(counts) == [1, 2, 3, 4]
    assert all(count == pytest.approx(1000, rel=0.1) for count in counts.values())


def test_a_run_that_kills_its_group_is_given_up_and_a_full_disk_is_not_its_fault(load, tmp_path):
    coordinator = TrialCoordinator(*load("{algorithm: grid}"), tmp_path)
    names = set()
    for _ in range(MAX_HAND_OUTS + 2):  # each time the group begins again
        names = {json.loads(run)["name"] for run in coordinator.take(0, 1).runs}
        coordinator.pardon(0)
        coordinator.start_over(0)
    assert names == {"t000"}
    for _ in range(MAX_HAND_OUTS + 1):
        names = {json.loads(run)["name"] for run in coordinator.take(0, 1).runs}
        coordinator.start_over(0)
    assert names == {"t001"}
    lines, num_ended = coordinator.news()
    assert num_ended == 1
    assert "its workers died 3 times" in lines[0]


def test_median_stopping_judges_together_what_arrives_together():
    """In a rising grid of rates the worst are those that come first."""
    arrivals = [Arrival(f"t{number}", 10, value) for number, value in enumerate((9.0, 8.0, 7.0, 1.0, 1.1))]

    def kept(scheduler, *, beside: bool) -> list[str]:
        return [
            arrival.trial
            for arrival in arrivals
            if scheduler.goes_on(arrival, beside=[a for a in arrivals if a is not arrival] if beside else [])
        ]

    assert kept(MedianStopping(grace_steps=10), beside=True) == ["t3", "t4"]
    assert kept(MedianStopping(grace_steps=10), beside=False) == ["t0", "t1", "t2", "t3", "t4"]  # the twin: in turns


def test_median_stopping_compares_with_the_others_at_the_same_step():
    median = MedianStopping(grace_steps=20)
    for name, value in (("a", 1.0), ("b", 2.0), ("c", 3.0)):
        for step in (10, 20):
            assert median.goes_on(Arrival(name, step, value))
    assert median.goes_on(Arrival("d", 10, 5.0))  # its grace
    assert not median.goes_on(Arrival("d", 20, 5.0))
    assert median.goes_on(Arrival("e", 20, 1.5))


# -- the study and its journal ---------------------------------------------------------------------------------------


def test_a_study_that_was_cut_off_anywhere_goes_on_as_it_would_have(load, tmp_path):
    def quality(point, step):
        return random.Random(json.dumps([point, step])).random()

    loaded = load("{algorithm: tpe, trials: 8, scheduler: asha}", more="seeds: 2")
    (tmp_path / "whole").mkdir()
    whole = study_of(loaded, tmp_path / "whole")
    names = play(whole, quality)
    journal = (tmp_path / "whole" / JOURNAL).read_bytes()
    assert len(names) < 16  # a trial that was stopped needs no other seed
    assert {run.outcome for run in whole.runs} == {"finished", "stopped"}
    assert all(len({run.outcome for run in trial.runs}) == 1 for trial in whole.trials)
    for cut in (1, len(journal) // 3, len(journal) // 2, len(journal) - 5):
        directory = tmp_path / f"cut{cut}"
        directory.mkdir()
        (directory / JOURNAL).write_bytes(journal[:cut])
        again = study_of(loaded, directory)
        play(again, quality)
        assert again.trials == whole.trials


def test_a_budget_ends_the_sweep_and_a_larger_one_goes_on(load, tmp_path):
    search = "{algorithm: random, budget: {steps: 100}}"
    study = study_of(load(search), tmp_path)
    play(study, lambda point, step: 1.0)
    assert study.steps == 100
    assert study.is_over
    assert [run.outcome for run in study.runs] == ["finished", "finished", None]
    study = study_of(load("{algorithm: random, budget: {steps: 130}}"), tmp_path)
    assert study.next_run().name == "t002"
    clock = iter(range(0, 10**6, 600))
    (tmp_path / "hours").mkdir()
    hours = study_of(load("{algorithm: random, budget: {hours: 1}}"), tmp_path / "hours", clock=lambda: next(clock))
    play(hours, lambda point, step: 1.0)
    assert "1 hours" in hours.spent


def test_the_best_is_a_finished_trial_and_how_sure_it_is_depends_on_the_seeds(load, tmp_path):
    study = study_of(load("{algorithm: grid}", more="seeds: 3"), tmp_path)
    while (run := study.next_run()) is not None:
        if run.trial == 0 and run.seed == 1:
            study.end(run.name, "diverged", "step 3: the loss is nan")
            continue
        study.report(run.name, Report(40, run.trial * 0.5 + run.seed * 0.01, 100, 1.0))
        study.end(run.name, "finished")
    assert study.ranked[-1].number == 0
    assert study.ranked[-1].status == "diverged"
    assert study.best.name == "t001"
    assert study.best.mean == pytest.approx(0.51)
    assert study.best.half_interval == pytest.approx(4.303 * 0.01 / 3**0.5)
    assert "which is more than their 95% intervals over 3 seeds" in conclusion(study)
    assert [run.name for run in study.trials[1].runs] == ["t001-seed0", "t001-seed1", "t001-seed2"]


def test_mode_max_turns_everything_round(load, tmp_path):
    study = study_of(load("{algorithm: grid, mode: max, scheduler: asha}"), tmp_path)
    play(study, lambda point, step: point["adapter.rank"])
    assert study.best.point["adapter.rank"] == 8
    assert {t.point["adapter.rank"] for t in study.trials if t.status == "stopped"} == set()


def test_a_resumed_run_that_tells_again_changes_nothing(load, tmp_path):
    study = study_of(load(), tmp_path)
    run = study.next_run()
    for step in (10, 20, 10, 20, 30):
        study.report(run.name, Report(step, 1.0 / step, step, step))
    assert [report.step for report in study.run(run.name).reports] == [10, 20, 30]


def test_choices_may_be_sections_and_null(load, tmp_path):
    space = "\n  adapter: [null, {rank: 4}, {rank: 8, targets: [q_proj]}]\n"
    study = study_of(load("{algorithm: tpe, trials: 7}", space=space), tmp_path)
    play(study, lambda point, step: 1.0 if point["adapter"] is None else 0.5)
    again = study_of(load("{algorithm: tpe, trials: 7}", space=space), tmp_path)
    assert again.trials == study.trials
    assert study.best.point["adapter"] is not None
    assert isinstance(study.space.domains["adapter"], Choice)
    assert isinstance(parse_domain({"uniform": [0, 1]}), Range)


def test_a_trial_of_one_seed_has_no_interval():
    trial = Trial(0, {}, runs=[SweepRun(0, 0, "t000", [Report(1, 2.0, 3, 4.0)], "finished")])
    assert (trial.mean, trial.half_interval, trial.tokens) == (2.0, None, 3)


def test_a_cloned_trial_runs_next_and_leaves_the_search_as_it_was(load, tmp_path):
    loaded = load("{algorithm: tpe, trials: 6}")

    def quality(point, step):
        return point["optimizer.learning_rate"]

    (tmp_path / "plain").mkdir()
    plain = study_of(loaded, tmp_path / "plain")
    play(plain, quality)
    study = study_of(loaded, tmp_path)
    for _ in range(2):
        run = study.next_run()
        study.report(run.name, Report(40, quality(study.trials[run.trial].point, 40), 4000, 20.0))
        study.end(run.name, "finished")
    other = study_of(loaded, tmp_path, is_driver=False)  # another process
    point = other.clone("t001", {"adapter.rank": 64, "optimizer.weight_decay": 0.1})
    assert study.space.config(point).adapter.alpha == 128
    with pytest.raises(ConfigError, match=r"adapter\.rank: 0 is refused"):
        other.clone("t001", {"adapter.rank": 0})
    with pytest.raises(NotFoundError, match="t009: no such trial; s has t000, t001"):
        other.clone("t009", {})
    (request,) = (tmp_path / "requests").glob("*.json")
    content = request.read_text()
    assert study.next_run() is not None
    request.write_text(content)  # its driver was ended between the two
    study = study_of(loaded, tmp_path)
    play(study, quality)
    assert not request.exists()
    assert [trial.cloned_from for trial in study.trials].count("t001") == 1
    assert study.trials[2].cloned_from == "t001"
    assert study.trials[2].point == point
    assert study.is_over
    assert [trial.point for trial in study.trials if trial.cloned_from is None] == [t.point for t in plain.trials]
    assert study_of(loaded, tmp_path).trials == study.trials
    assert importance(study.trials[:2], study.space, study.config.search) is None


def test_the_report_shows_every_trial_and_how_to_run_the_best_again(load, tmp_path):
    more = "overrides: {optimizer: {weight_decay: 0.5}, data.overlong: truncate}"
    study = study_of(load("{algorithm: random, trials: 12}", more=more), tmp_path)
    play(study, lambda point, step: point["optimizer.learning_rate"] + 1 / step)
    study.clone("t001", {"adapter.rank": 64})
    play(study, lambda point, step: 1.0)
    write_json(tmp_path / "environment.json", {"packages": {"torch": "2"}})
    page = write_sweep_report(study, tmp_path).read_text()
    assert all(f"<td>{trial.name}</td>" in page for trial in study.trials)
    assert "cloned from t001" in page
    assert page.count("<svg") == 3
    assert page.count("to come") == 0
    assert "<b>13 of 13</b>" in page
    assert "http-equiv" not in page  # it is over
    words = shlex.split(train_command(study, study.best_run))
    run = load_config(words[2], words[3:], kind="run")
    wanted = study.config_of(study.best_run)
    for key in ("adapter", "optimizer", "data", "seed", "max_steps"):
        assert getattr(run, key) == getattr(wanted, key)


def test_the_page_of_a_sweep_that_runs_shows_what_is_to_come_and_links_reports(load, tmp_path):
    study = study_of(load("{algorithm: random, trials: 6}"), tmp_path)
    play(study, lambda point, step: 1 / step, until=2)  # one is finished, one has begun
    write_json(tmp_path / "environment.json", {"packages": {"torch": "2"}})
    write_bytes(tmp_path / "trials" / "t000" / "report.html", b"")
    page = write_sweep_report(study, tmp_path).read_text()
    assert "<b>2 of 6</b>" in page
    assert page.count("<td>to come</td>") == 4
    assert '<a href="trials/t000/report.html">t000</a>' in page
    assert "<td>t001</td>" in page  # which has none yet
    assert [point["adapter.rank"] for point in study.points_to_come] == [
        study_of(load("{algorithm: random, trials: 6}"), tmp_path / "other").points_to_come[at]["adapter.rank"]
        for at in range(2, 6)
    ]
    assert study_of(load("{algorithm: tpe, trials: 6}"), tmp_path / "tpe").points_to_come == []


def test_a_run_that_diverged_before_its_first_report_counts_what_it_did(load, tmp_path):
    study = study_of(load("{algorithm: random, trials: 2}"), tmp_path)
    run = study.next_run()
    study.end(run.name, "diverged", "step 2: the loss is nan", progress=Progress(1, 195, 0.5))
    for known in (study, study_of(load("{algorithm: random, trials: 2}"), tmp_path)):
        trial = known.trials[0]
        assert (trial.step, trial.tokens, trial.seconds) == (1, 195, 0.5)
        assert (known.steps, known.tokens) == (1, 195)


def test_the_winner_is_published_as_the_file_says(load):
    assert load()[0].publish.name is None
    assert load(more="publish: {name: winner, alias: candidate}")[0].publish.alias == "candidate"
    assert load(more="publish: off")[0].publish == "off"
    with pytest.raises(ConfigError, match=r"publish"):
        load(more="publish: never")


def test_sampled_answers_do_not_keep_trials_apart(load):
    assert fusing_of(*load(more="overrides: {evaluation: {samples: 2}}")).reason is None


def test_a_command_of_a_sweep_or_a_file(tmp_path, capsys):
    for words, said in (
        (["sweep", "stop-trial", "s", "t001", "--runs-dir", str(tmp_path)], "s: no such sweep"),
        (["sweep", "clone-trial", "s", "t001", "a=1", "--runs-dir", str(tmp_path)], "s: no such sweep"),
        (["sweep", str(tmp_path / "nothing.yaml")], "no such file"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(words)
        assert said in capsys.readouterr().err


def test_what_can_be_fused_and_why_not(load):
    whole = fusing_of(*load())
    assert whole.reason is None
    assert whole.example is not None
    for how, reason in (
        ({"space": "\n  adapter: [null]\n"}, "trains the base itself"),
        ({"more": "overrides: {zero.stage: 3}"}, "zero.stage"),
        ({"more": "overrides: {workers.count: [1, 2]}"}, "workers.count"),
        ({"more": "overrides: {callbacks: ['own:f']}"}, "callbacks: ['own:f'] cannot be fused"),
        ({"search": "{algorithm: grid, fused: off}"}, "search.fused: off"),
        (
            {"search": "{algorithm: random, budget: {steps: 9}}", "space": "\n  adapter: [{rank: 4}, null]\n"},
            "without a number of trials",
        ),
        ({"search": "{algorithm: tpe, trials: 4}", "space": "\n  adapter: [{rank: 4}, null]\n"}, "tpe learns from all"),
    ):
        fusing = fusing_of(*load(**how))
        assert fusing.example is None
        assert reason in fusing.reason
    for how, reason in (
        ({"space": "\n  adapter: [{rank: 4}, null]\n"}, "trains the base itself"),
        ({"space": "\n  adapter.variant: [lora, dora]\n"}, "adapter.variant: dora cannot be fused"),
        ({"space": "\n  adapter.dropout: [0.0, 0.1]\n"}, "adapter.dropout"),
        ({"space": "\n  adapter.targets: [[q_proj], [q_proj, lm_head]]\n"}, "adapter.targets"),
        ({"space": "\n  objective: [{type: sft}, {type: text}]\n"}, "objective: it is shared"),
        ({"space": "\n  base_model: [a, b]\n"}, "base_model: it is shared"),
    ):
        loaded = load(**how)
        fusing = fusing_of(*loaded)
        assert reason in fusing.reason
        space = loaded[1]
        assert [fusing.holds(space.config(point)) for point in space.grid()] == [True, False]


def test_some_trials_in_groups_and_the_rest_apart(load, tmp_path):
    """Groups take what fits and leave the rest to a process each; a sweep that was cut off between goes on."""
    space = "\n  adapter: [null, {rank: 4}]\n  optimizer.learning_rate: [1e-3, 1e-2]\n"
    study = study_of(load(space=space, more="seeds: 2"), tmp_path)
    fusing = fusing_of(study.config, study.space)
    grouped = []
    while (run := study.next_run(fusing.holds)) is not None:
        grouped.append(run.name)
        study.report(run.name, Report(40, 1.0, 1, 1.0))
        study.end(run.name, "finished")
    assert grouped == ["t002-seed0", "t002-seed1", "t003-seed0", "t003-seed1"]
    assert not study.is_over
    again = study_of(load(space=space, more="seeds: 2"), tmp_path)
    assert play(again, lambda point, step: 1.0) == ["t000-seed0", "t000-seed1", "t001-seed0", "t001-seed1"]
    assert again.is_over


def test_a_metric_that_is_no_number_ends_a_trial_and_harms_no_other(load, tmp_path):
    for algorithm in ("tpe", "random"):
        directory = tmp_path / algorithm
        directory.mkdir()
        loaded = load(f"{{algorithm: {algorithm}, trials: 12, scheduler: asha}}")
        study = study_of(loaded, directory)
        while (run := study.next_run()) is not None:
            for step in (10, 20, 30, 40):
                value = float("nan") if run.trial % 3 == 0 and step >= 20 else 10.0 / (run.trial + 1) / step
                if study.report(run.name, Report(step, value, step, step)) is not None:
                    study.end(run.name, "stopped")
                    break
            else:
                study.end(run.name, "finished")
        statuses = [trial.status for trial in study.trials]
        assert {statuses[number] for number in (0, 3, 6, 9)} == {"diverged"}
        assert statuses.count("finished") == 8
        assert "eval_loss is nan" in study.trials[0].message
        assert study_of(loaded, directory).trials == study.trials
        assert study.best.number == 11


def test_a_finished_run_whose_last_metric_is_no_number_has_diverged(load, tmp_path):
    study = study_of(load(), tmp_path)
    run = study.next_run()
    study.report(run.name, Report(40, float("inf"), 1, 1.0))
    assert study.end(run.name, "finished").outcome == "diverged"


def test_clones_keep_to_what_a_sweep_has_in_common(load, tmp_path):
    study = study_of(load(), tmp_path)
    study.next_run()
    for changes, reason in (
        ({"seed": 7}, "give `seeds`"),
        ({"data.eval": "other.jsonl"}, "cannot be compared"),
        ({"runs_dir": "/q"}, "trials lie in"),
        ({"data.tran": "other.jsonl"}, "data.tran"),
    ):
        with pytest.raises(ConfigError, match=reason):
            study.clone("t000", changes)
    study.clone("t000", {"adapter.dropout": 0.1})  # it cannot be fused: it waits until the groups are done
    fits = fusing_of(study.config, study.space).holds
    names = []
    while (run := study.next_run(fits)) is not None:
        names.append(run.name)
    assert len(names) == 5
    assert study.trials[1].point["adapter.dropout"] == 0.1
    assert study.next_run().name == "t001"


def test_a_point_that_the_schema_refuses_fails_alone(load, tmp_path):
    study = study_of(load("{algorithm: random, trials: 2}"), tmp_path)
    study._search.point = lambda number, earlier: {"adapter.rank": number * 4, "optimizer.learning_rate": 1e-3}
    assert play(study, lambda point, step: 1.0) == ["t001"]
    assert [trial.status for trial in study.trials] == ["failed", "finished"]
    assert "adapter.rank: 0 is refused" in study.trials[0].message


def test_half_a_line_on_a_full_disk_is_taken_back(load, tmp_path, monkeypatch):
    study = study_of(load(), tmp_path)
    run = study.next_run()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError):
            study.report(run.name, Report(10, 1.0, 1, 1.0))
    study.report(run.name, Report(10, 1.0, 1, 1.0))
    assert [report.step for report in study_of(load(), tmp_path).run(run.name).reports] == [10]


def test_without_seeds_a_trial_has_the_runs_own(load):
    assert load(more="overrides: {seed: 42}")[0].seeds == (42,)
    assert load(more="seeds: 2")[0].seeds == (0, 1)


def test_variables_are_values_that_expressions_use_and_no_run_has(load, tmp_path):
    space = """
  adapter: [null, {rank: 8}]
  variables.rate: {log_uniform: [1e-5, 1e-3], points: 3}
  optimizer.learning_rate: {expression: variables.rate * (1 if adapter == null else 10)}
"""
    config, loaded = load(space=space)
    rates = [loaded.config(point).optimizer.learning_rate for point in loaded.grid()]
    assert rates == pytest.approx([1e-5, 1e-4, 1e-3, 1e-4, 1e-3, 1e-2])
    study = Study(config, loaded, tmp_path)
    study.next_run()
    assert "variables." not in train_command(study, study.runs[0])
    with pytest.raises(ConfigError, match=r"a run has no key 'variables\.other'"):
        load(space=space.replace("variables.rate *", "variables.other *"))


def test_an_expression_finds_what_the_runs_file_has_and_defaults(load):
    space = """
  optimizer.learning_rate: [1e-3]
  adapter.alpha: {expression: adapter.rank * 2}
  optimizer.warmup_steps: {expression: max_steps // 10}
"""
    _, loaded = load(space=space)
    assert loaded.overrides({"optimizer.learning_rate": 1e-3}) == {
        "optimizer.learning_rate": 1e-3,
        "adapter.alpha": 32,
        "optimizer.warmup_steps": 4,
    }


def test_rows_are_shared_where_that_is_faster():
    """The first steps take turns; the first two warm up, and steps of one member tell nothing."""
    for shared, single, faster in ((300.0, 200.0, True), (200.0, 300.0, False)):
        sharing = RowSharing()
        ways = []
        for step in range(20):
            ways.append(sharing.now)
            sharing.note(9999.0 if step < 2 else shared if sharing.now else single, num_members=2)
            sharing.note(1e9, num_members=1)
        assert sharing.is_faster is faster
        assert ways[:8] == [True, False] * 4
        assert ways[8:] == [faster] * 12
    kept = RowSharing(is_faster=False)
    assert not kept.now


def test_a_cell_of_the_heat_map_says_where_nothing_came_to_its_end(load, tmp_path):
    study = study_of(load("{algorithm: grid, budget: {steps: 230}}"), tmp_path)  # of 240 in all
    play(study, lambda point, step: step / 1000)
    page = heat_map(study, ("adapter.rank", "optimizer.learning_rate"))
    assert page.count("(not to the end)") == 1
    assert status_text(study.trials[0], study) == "finished"
    assert status_text(study.trials[5], study) == "cut off: the budget of 230 steps is spent"


def test_a_point_stands_in_its_own_cell_of_the_heat_map():
    """Also where whole numbers fall together: log_int_uniform 1 to 16 has 7 of 8 points."""
    domain = parse_domain({"log_int_uniform": [1, 16], "points": 8})
    assert domain.grid == [1, 2, 3, 5, 7, 11, 16]
    assert [cell(domain, value, len(domain.grid)) for value in domain.grid] == list(range(7))


def test_a_trial_is_stopped_with_the_seeds_that_have_not_begun(load, tmp_path):
    study = study_of(load(more="seeds: 3"), tmp_path)
    first = study.next_run()
    (tmp_path / "trials" / first.name).mkdir(parents=True)
    asked = study_of(load(more="seeds: 3"), tmp_path, is_driver=False)
    assert asked.stop(asked.trial("t000")) == ["t000-seed0", "t000-seed1", "t000-seed2"]
    assert (tmp_path / "trials" / first.name / "stop_request").is_file()
    assert study.next_run().name == "t001-seed0"
    assert [(run.outcome, run.message) for run in study.trials[0].runs[1:]] == [("stopped", "by the user")] * 2
    # One that began between the user's look and the request hears of it at its next report.
    late = study.next_run()
    (tmp_path / "requests" / late.name).touch()
    assert study.report(late.name, Report(10, 1.0, 1, 1.0)) == "by the user"


def test_a_missing_file_of_any_point_is_told_before_the_first_trial(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("train.jsonl", "eval.jsonl"):
        (tmp_path / name).write_text("{}\n")
    (tmp_path / "base").mkdir()
    monkeypatch.setattr("ftray.train.prepare.check_base_name", lambda name: None)
    space = " {data.train: [train.jsonl, trian.jsonl], optimizer.learning_rate: [1.0e-3]}"
    prepare_sweep(*load("{algorithm: grid}"))
    with pytest.raises(DataError, match=r"trian\.jsonl: no such file; did you mean train\.jsonl"):
        prepare_sweep(*load("{algorithm: grid}", space=space))


def test_no_more_members_than_memory_holds(monkeypatch):
    from torch import nn
    from transformers import LlamaConfig

    class Base(nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.head = nn.ModuleDict({"layer": nn.Linear(1000, 1000)}), nn.Linear(1000, 5000)
            self.config = LlamaConfig()

        def get_decoder(self):
            return self.model

        def get_output_embeddings(self):
            return self.head

    adapters = [AdapterConfig(rank=4), AdapterConfig(rank=8, targets=["layer"]), AdapterConfig(targets=["nothing"])]
    room = MemoryBudget(Base(), adapters, choose_hardware(use_gpu=False), world_size=1, ranks_per_node=1)
    assert room.largest == 8 * 2000 * 16
    for free, members, has_trained, left in (
        (10 * room.largest, 0, False, 5),
        (10 * room.largest, 3, True, 9),
        (0, 0, True, 1),
        (0, 1, True, 0),
    ):
        monkeypatch.setattr(MemoryBudget, "free", free)
        assert room.left(members, has_trained=has_trained) == left
    two = MemoryBudget(Base(), adapters, choose_hardware(use_gpu=False), world_size=2, ranks_per_node=2)
    assert two.largest == 8 * 2000 * 24
