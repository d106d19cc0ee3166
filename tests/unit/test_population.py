"""Population-based training without Ray: who takes over from whom, and a sweep that was cut off at any point."""

import contextlib
import shutil

import pytest
from tiny import RUN_OF_SWEEPS

from ftray.config import load_sweep
from ftray.config.domains import Range
from ftray.config.space import short
from ftray.errors import ConfigError
from ftray.storage import read_json, write_json, write_manifest
from ftray.sweep.report.report import write_sweep_report
from ftray.sweep.report.text import describe_moves
from ftray.sweep.search.population import RATE, Moved, choose_moves, take_over
from ftray.sweep.study import Study
from ftray.sweep.trials import Report, trials_directory
from ftray.tracking.events import read_events

SPACE = "{optimizer.learning_rate: {log_uniform: [1.0e-4, 1.0e-1]}}"
SEARCH = "{algorithm: random, trials: 8, scheduler: pbt}"
RATES = Range(1e-4, 1e-1, is_log=True, is_int=False)


@pytest.fixture
def load(tmp_path):
    (tmp_path / "run.yaml").write_text(RUN_OF_SWEEPS)

    def load(search: str = SEARCH, *, space: str = SPACE, more: str = ""):
        (tmp_path / "sweep.yaml").write_text(
            f"kind: sweep\nname: s\nrun: {tmp_path}/run.yaml\nspace: {space}\nsearch: {search}\n{more}\n"
        )
        return load_sweep(tmp_path / "sweep.yaml")

    return load


def train(study: Study, directory, run) -> str:
    """Up to the generation's end; its weights are a file that tells whose they are, and where they have been."""
    path = trials_directory(directory) / run.name
    checkpoints = path / "checkpoints"
    config = study.config_of(run)
    start = max((int(p.name.removeprefix("step-")) for p in checkpoints.glob("step-*")), default=0)
    weights = (checkpoints / f"step-{start}" / "weights").read_text() if start else ""
    until = min(study.until_step, 40)
    for step in range(start + 10, until + 1, 10):
        weights += f"{run.name}@{step} "
        (checkpoints / f"step-{step}").mkdir(parents=True, exist_ok=True)
        (checkpoints / f"step-{step}" / "weights").write_text(weights)
        write_manifest(checkpoints / f"step-{step}", metadata={})
        distance = abs(config.optimizer.learning_rate - 1e-2)
        study.report(run.name, Report(step, 10 * distance + 1 / step, step * 100, step * 1.0))
    study.end(run.name, "finished" if until == 40 else "stopped")
    return weights


def play(study: Study, directory, *, until_event: int | None = None) -> dict[str, str]:
    weights = {}
    while (run := study.next_run()) is not None:
        weights[run.name] = train(study, directory, run)
        if until_event is not None and num_events(directory) >= until_event:
            break
    return weights


def one_member_short(load, directory) -> tuple[Study, list]:
    """Seven of eight wait at the first generation's end."""
    study = Study(*load(), directory)
    runs = [study.next_run() for _ in range(8)]
    for run in runs[:7]:
        train(study, directory, run)
    return study, runs


@contextlib.contextmanager
def cut_off(monkeypatch, place: str, crash):
    """What happens within ends with the driver's death at this place."""
    with monkeypatch.context() as patch:
        patch.setattr(place, crash)
        with pytest.raises(KeyboardInterrupt):
            yield


def num_events(directory) -> int:
    return len((directory / "trials.jsonl").read_text().splitlines())


def test_the_worst_quarter_takes_over_from_the_best_within_the_range():
    values = {f"t{i}": float(i) for i in range(8)}
    points = {f"t{i}": {RATE: 1e-3 * (i + 1)} for i in range(8)}
    moves = choose_moves(values, points, RATES, saved=values, seed="0/1")
    assert {move.run for move in moves} == {"t6", "t7"}
    assert {move.source for move in moves} <= {"t0", "t1"}
    for move in moves:
        assert move.point[RATE] / points[move.source][RATE] == pytest.approx(0.8) or move.point[RATE] / points[
            move.source
        ][RATE] == pytest.approx(1.2)
    assert choose_moves(values, points, RATES, saved=values, seed="0/1") == moves
    assert {move.source for move in choose_moves(values, points, RATES, saved=["t1", "t7"], seed="0/1")} == {"t1"}
    assert choose_moves(values, points, RATES, saved=["t7"], seed="0/1") == []
    narrow = Range(1e-3, 1.1e-3, is_log=True, is_int=False)
    assert all(
        1e-3 <= move.point[RATE] <= 1.1e-3 for move in choose_moves(values, points, narrow, saved=values, seed="0/1")
    )
    few = choose_moves(
        {"a": 1.0, "b": 2.0, "c": 3.0}, {name: {RATE: 1e-2} for name in "abc"}, RATES, saved="abc", seed=""
    )
    assert [(move.run, move.source) for move in few] == [("c", "a")]
    assert choose_moves({"a": 1.0}, {"a": {RATE: 1e-2}}, RATES, saved="a", seed="") == []


def test_generations_wait_for_each_other_and_the_worst_go_on_from_the_best(load, tmp_path):
    study = Study(*load(), tmp_path)
    first = [study.next_run() for _ in range(8)]
    assert study.next_run() is None
    assert study.waits
    rates = {run.name: study.config_of(run).optimizer.learning_rate for run in first}
    for run in first[:7]:
        train(study, tmp_path, run)
    assert study.next_run() is None  # one is missing
    assert study.moves == []
    train(study, tmp_path, first[7])
    assert {moved.step for moved in study.moves} == {10}
    by_distance = sorted(rates, key=lambda name: abs(rates[name] - 1e-2))
    assert {moved.run for moved in study.moves} == set(by_distance[6:])
    assert {moved.source for moved in study.moves} <= set(by_distance[:2])
    moved = study.moves[0]
    path = trials_directory(tmp_path) / moved.run
    assert (path / "checkpoints/step-10/weights").read_text() == f"{moved.source}@10 "
    assert read_json(path / "config.json")["optimizer"]["learning_rate"] == moved.rate
    assert read_events(path)[-1]["event"] == "took_over"
    weights = play(study, tmp_path)
    assert study.is_over
    assert not study.waits
    assert all(run.outcome == "finished" for run in study.runs)
    assert weights[moved.run].split()[0] != f"{moved.run}@10"
    assert [word.rpartition("@")[2] for word in weights[moved.run].split()] == ["10", "20", "30", "40"]
    assert f"{moved.run} from {moved.source} at step 10" in describe_moves(study, moved.run)


def test_a_population_that_was_cut_off_anywhere_goes_on_as_it_would_have(load, tmp_path):
    whole_directory = tmp_path / "whole"
    whole_directory.mkdir()
    whole = Study(*load(), whole_directory)
    weights = play(whole, whole_directory)
    for cut in range(8, num_events(whole_directory), 7):
        directory = tmp_path / f"cut{cut}"
        directory.mkdir()
        play(Study(*load(), directory), directory, until_event=cut)
        study = Study(*load(), directory)
        study.take_back({run.name for run in study.runs})
        last = play(study, directory)
        assert study.moves == whole.moves
        assert [run.point for run in study.runs] == [run.point for run in whole.runs]
        assert all(weights[name] == text for name, text in last.items())


def test_a_turn_that_was_cut_off_between_its_files_and_the_journal_is_made_again(load, tmp_path, monkeypatch):
    study, runs = one_member_short(load, tmp_path)

    def crash(*_, **__):
        shutil.rmtree(trials_directory(tmp_path) / study_moves[0] / "checkpoints")
        raise KeyboardInterrupt

    study_moves = [max(runs, key=lambda run: abs(study.config_of(run).optimizer.learning_rate - 1e-2)).name]
    with cut_off(monkeypatch, "ftray.sweep.search.population.write_json", crash):
        train(study, tmp_path, runs[7])
    again = Study(*load(), tmp_path)
    assert len({moved.run for moved in again.moves}) == len(again.moves) == 2
    play(again, tmp_path)
    assert all(run.outcome == "finished" for run in again.runs)


def test_a_member_that_diverges_leaves_and_the_others_go_on(load, tmp_path):
    study, runs = one_member_short(load, tmp_path)
    study.end(runs[7].name, "diverged", "step 3: the loss is nan")
    play(study, tmp_path)
    assert [run.outcome for run in study.runs].count("finished") == 7


def test_a_turn_that_was_cut_off_between_two_moves_makes_the_other_one_only(load, tmp_path, monkeypatch):
    study, runs = one_member_short(load, tmp_path)
    real, taken = take_over, []

    def once(*args, **kwargs):
        if taken:
            raise KeyboardInterrupt
        taken.append(args)
        real(*args, **kwargs)

    with cut_off(monkeypatch, "ftray.sweep.study.take_over", once):
        train(study, tmp_path, runs[7])
    again = Study(*load(), tmp_path)
    assert len({moved.run for moved in again.moves}) == len(again.moves) == 2
    # The same study may go on too: where the disk was full, a group's workers start again and ask it for runs.
    assert study.next_run() is not None
    assert study.moves == again.moves


def test_the_way_of_the_weights_is_told_over_several_moves(load, tmp_path):
    study = Study(*load(), tmp_path)
    study.moves += [Moved(10, "b", "a", 1.0), Moved(10, "d", "c", 2.0), Moved(20, "c", "b", 3.0)]
    assert [(moved.run, moved.source) for moved in study.history("c")] == [("b", "a"), ("c", "b")]
    assert study.history("a") == []


def test_one_that_the_user_stops_while_it_waits_leaves_the_population(load, tmp_path):
    study, runs = one_member_short(load, tmp_path)
    assert study.stop(study.trials[0]) == [runs[0].name]
    train(study, tmp_path, runs[7])
    assert (runs[0].outcome, runs[0].message) == ("stopped", "by the user")
    assert runs[0].name not in {moved.source for moved in study.moves}
    play(study, tmp_path)
    assert [run.outcome for run in study.runs].count("finished") == 7


def test_one_whose_checkpoint_failed_is_taken_over_by_nobody(load, tmp_path):
    study = Study(*load(), tmp_path)
    runs = [study.next_run() for _ in range(8)]
    best = min(runs, key=lambda run: abs(study.config_of(run).optimizer.learning_rate - 1e-2))
    others = [run for run in runs if run is not best]
    train(study, tmp_path, best)
    (trials_directory(tmp_path) / best.name / "checkpoints/step-10/manifest.json").unlink()
    for run in others:
        train(study, tmp_path, run)
    assert len(study.moves) == 2
    assert best.name not in {moved.source for moved in study.moves}


def test_a_budget_that_is_spent_where_a_generation_ends_loses_no_member(load, tmp_path):
    study = Study(*load(SEARCH[:-1] + ", budget: {steps: 80}}"), tmp_path)
    runs = [study.next_run() for _ in range(8)]
    for run in runs:
        train(study, tmp_path, run)
    assert study.spent is not None
    more = Study(*load(SEARCH[:-1] + ", budget: {steps: 8000}}"), tmp_path)
    play(more, tmp_path)
    assert all(run.outcome == "finished" for run in more.runs)


def test_the_table_shows_what_a_member_went_on_with(load, tmp_path):
    study = Study(*load(), tmp_path)
    play(study, tmp_path)
    moved = study.moves[-1]
    trial = study.trials[study.run(moved.run).trial]
    assert trial.latest[RATE] == moved.rate != trial.point[RATE]
    write_json(tmp_path / "environment.json", {"packages": {}})
    page = write_sweep_report(study, tmp_path).read_text()
    assert short(moved.rate) in page
    assert "ftray train" not in page, "no single command gives weights that come from several trials"


def test_a_clone_that_the_others_could_not_take_over_is_refused(load, tmp_path):
    study = Study(*load(), tmp_path)
    study.next_run()
    with pytest.raises(ConfigError, match="each other's weights"):
        study.clone("t000", {"adapter.rank": 4})
    with pytest.raises(ConfigError, match="each other's weights"):
        study.clone("t000", {"optimizer.type": "adamw_8bit"})
    assert study.clone("t000", {"optimizer.max_grad_norm": 0.5})["optimizer.max_grad_norm"] == 0.5


def test_what_a_population_cannot_have_is_said_before_it_starts(load):
    for how, rule in (
        ({"search": "{algorithm: tpe, trials: 8, scheduler: pbt}"}, "choose algorithm random or grid"),
        ({"search": "{algorithm: random, budget: {steps: 9}, scheduler: pbt}"}, "give trials"),
        ({"search": "{algorithm: random, trials: 8, generation_steps: 5}"}, "is for scheduler pbt"),
        ({"search": SEARCH[:-1] + ", generation_steps: 15}"}, "multiple of evaluation.every"),
        ({"space": "{optimizer.learning_rate: [1.0e-3, 1.0e-2]}"}, "give it a range"),
        ({"space": SPACE[:-1] + ", adapter.rank: [4, 8]}"}, "each other's weights"),
        ({"more": "seeds: 3"}, "give one seed"),
    ):
        with pytest.raises(ConfigError, match=rule):
            load(**how)
