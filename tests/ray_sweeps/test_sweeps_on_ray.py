"""Sweeps on Ray Tune, end to end, and our ASHA against Ray's."""

import random
from pathlib import Path

import pytest
from ray.tune.schedulers import AsyncHyperBandScheduler

from ftray.cli.main import main
from ftray.config import load_sweep
from ftray.errors import UserError
from ftray.storage import read_json
from ftray.sweep.launch import look_into, run_sweep
from ftray.sweep.search.schedulers import Arrival, Asha
from ftray.tracking.metrics import read_metrics


@pytest.fixture
def sweep_file(tiny_model, train_file, eval_file, tmp_path):
    run = tmp_path / "run.yaml"
    run.write_text(
        f"kind: run\nname: r\nbase_model: {tiny_model}\nmax_steps: 200\n"
        f"runs_dir: {tmp_path}/runs\nregistry: {tmp_path}/registry\n"
        f"data: {{train: {train_file}, eval: {eval_file}, max_example_tokens: 256}}\n"
        "batch: {examples_per_step: 4, tokens_per_micro_batch: 512}\nevaluation: {every: 20}\n"
    )
    path = tmp_path / "sweep.yaml"
    path.write_text(
        f"kind: sweep\nname: s\nrun: {run}\n"
        "space:\n  adapter.rank: [4]\n  adapter.alpha: {expression: 2 * adapter.rank}\n"
        "  optimizer.learning_rate: [5e-3, 1e-6, 2e-6, 1e+30]\n"
        "search: {algorithm: grid, scheduler: asha, grace_steps: 20, reduction_factor: 2}\n"
    )
    return path


def test_fused_trials_stop_hand_their_slots_on_diverge_and_go_on(ray_session, sweep_file, tmp_path, capsys):
    how = ["search.fused=2"]
    out = run_sweep_command(sweep_file, "search.trials=3", *how, capsys=capsys)
    assert "fused: 2 at a time over one base" in out
    assert "published s@1" in out
    assert "best: t000 (adapter.rank=4, optimizer.learning_rate=0.005)" in out
    trials = tmp_path / "runs/s/trials"
    first = read_json(trials / "t000/result.json")
    assert first["steps"] == 200
    assert last_evaluation(trials / "t001") < 200  # stopped at a rung
    assert not (trials / "t001/result.json").exists()
    going_on, stopped, next_one = (read_metrics(trials / f"t00{n}") for n in range(3))
    assert stopped[-1]["time"] < next_one[0]["time"] < going_on[-1]["time"], "its slot is filled while the other trains"
    # With more trials it goes on; what was done is not done again.
    out = run_sweep_command(sweep_file, "search.trials=4", *how, capsys=capsys)
    assert read_json(trials / "t000/result.json") == first
    assert "t000  step" not in out
    assert "diverged: step" in out
    assert "published s@1" in out  # the same files: no second version
    with pytest.raises(UserError, match="another config"):
        run_sweep(*load_sweep(sweep_file, ["search.seed=3"]), log=print)


def test_two_groups_share_the_trials(ray_session, sweep_file, tmp_path, capsys, monkeypatch):
    """As on two nodes: both take from one coordinator, and none is given a trial that the other has."""
    monkeypatch.setattr("ftray.sweep.launch.groups_of", lambda run: (run, 2))
    sweep_file.write_text(
        f"kind: sweep\nname: two\nrun: {tmp_path}/run.yaml\noverrides: {{max_steps: 20}}\n"
        "space: {optimizer.learning_rate: [1e-3, 2e-3, 5e-3, 1e-2, 2e-2]}\nsearch: {algorithm: grid, fused: 2}\n"
    )
    out = run_sweep_command(sweep_file, capsys=capsys)
    assert "fused: 4 at a time over one base" in out
    assert "in 2 groups" in out
    directory = tmp_path / "runs/two"
    assert len(list((directory / "ray-train").glob("group-*"))) == 2
    begun = []
    for run in look_into(directory).runs:
        assert run.outcome == "finished"
        records = [record for record in read_metrics(directory / "trials" / run.name) if "loss" in record]
        assert [record["step"] for record in records] == list(range(1, 21)), "no step is missing or doubled"
        begun.append((records[0]["time"], records[-1]["time"]))
    # Four at once are more than a group of two holds.
    assert max(sum(first <= time <= last for first, last in begun) for time, _ in begun) > 2


def run_sweep_command(*words: object, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit, match="0"):
        main(["sweep", *map(str, words)])
    return capsys.readouterr().out


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run) if "loss" in record]


def last_evaluation(run: Path) -> int:
    return max(record["step"] for record in read_metrics(run) if "eval_loss" in record)


def test_asha_decides_as_rays_does():
    assert disagreements(Asha(grace_steps=2, reduction_factor=3)) == 0


def test_a_broken_asha_is_told_apart():
    class Broken(Asha):
        def _rung_at(self, step: int) -> int | None:
            return super()._rung_at(step + 1)

    assert disagreements(Broken(grace_steps=2, reduction_factor=3)) > 0


def disagreements(asha: Asha) -> int:
    """Over 200 runs whose reports come in a mixed order."""

    class RayTrial:
        def __init__(self, number: int):
            self.trial_id = str(number)
            self.floor = random.Random(number).random()
            self.step = 0

    theirs = AsyncHyperBandScheduler(time_attr="step", max_t=10**6, grace_period=2, reduction_factor=3)
    theirs.set_search_properties("value", "min")
    chance = random.Random(0)
    waiting = [RayTrial(number) for number in range(200)]
    running, count = [], 0
    while waiting or running:
        if waiting and len(running) < 8:
            running.append(waiting.pop())
            theirs.on_trial_add(None, running[-1])
        trial = chance.choice(running)
        trial.step += 1
        value = trial.floor + chance.random() / trial.step
        ours = asha.goes_on(Arrival(trial.trial_id, trial.step, value))
        decision = theirs.on_trial_result(None, trial, {"step": trial.step, "value": value})
        count += ours != (decision == "CONTINUE")
        if not ours or decision != "CONTINUE" or trial.step == 60:
            running.remove(trial)
    return count


def test_lora_and_full_fine_tuning_side_by_side(ray_session, sweep_file, eval_file, tmp_path, capsys):
    """LoRA in a group, full fine-tuning apart, and both compared on what they learned, broke and cost."""
    general = tmp_path / "general.jsonl"
    general.write_text('{"text": "the quick brown fox jumps over the lazy dog"}\n')
    sweep_file.write_text(
        f"kind: sweep\nname: c\nrun: {tmp_path}/run.yaml\noverrides: {{max_steps: 20}}\n"
        "space:\n  adapter: [null, {rank: 4}]\n  variables.rate: [1e-2, 1e+30]\n"
        "  optimizer.learning_rate: {expression: variables.rate * (1 if adapter == null else 2)}\n"
        f"search: {{algorithm: grid}}\ncompare: {{key: adapter, general_text: {general}}}\n"
    )
    out = run_sweep_command(sweep_file, capsys=capsys)
    assert "fused: 4 at a time" in out
    assert "apart: " in out
    assert out.count("diverged: step") == 2, "in the group and apart"
    assert "adapter: null trains the base itself" in out
    assert "adapter {rank: 4}: eval_loss" in out
    directory = tmp_path / "runs/c"
    measured = read_json(directory / "comparison.json")
    assert len(measured["scores"]) == 3
    assert len({score["general_loss"] for score in measured["scores"].values()}) == 3
    assert measured["scores"]["base"]["general_loss"] == pytest.approx(loss_of_text(tmp_path, general), rel=1e-4)
    assert all(alone["tokens_per_s"] > 0 and alone["memory_gib"] > 0 for alone in measured["alone"].values())
    changed = (directory / "comparison.json").stat().st_mtime_ns
    again = run_sweep_command(sweep_file, capsys=capsys)
    assert "scoring" not in again
    assert (directory / "comparison.json").stat().st_mtime_ns == changed


def loss_of_text(tmp_path: Path, general: Path) -> float:
    """transformers' own, of the base: bos, the text and eos as objective text encodes them."""
    import json

    import torch
    from transformers import AutoModelForCausalLM

    from ftray.config import load_config
    from ftray.config.data import DataConfig
    from ftray.data.tokens import tokenize_source
    from ftray.model.base import load_tokenizer, prepare_base
    from ftray.model.chat import ChatRenderer

    base = load_config(tmp_path / "run.yaml", kind="run").base_model
    data = DataConfig(train=str(general), overlong="split", max_example_tokens=256)
    renderer = ChatRenderer(load_tokenizer(prepare_base(base)))
    ids = torch.tensor(
        [tokenize_source("t", str(general), data, renderer, shape="document").sequences(0)[0][0].tolist()]
    )
    model = AutoModelForCausalLM.from_pretrained(base)
    assert json.loads(general.read_text())["text"] in renderer.tokenizer.decode(ids[0])
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids).loss)


def test_a_population_learns_the_same_in_a_group_and_apart(ray_session, sweep_file, tmp_path, capsys):
    sweep_file.write_text(
        f"kind: sweep\nname: p\nrun: {tmp_path}/run.yaml\noverrides: {{max_steps: 40}}\n"
        "space: {optimizer.learning_rate: {log_uniform: [1.0e-5, 1.0e-1]}}\n"
        "search: {algorithm: random, trials: 2, scheduler: pbt}\n"
    )
    found = {}
    tracked = ["overrides.tracking.wandb=offline", "overrides.tracking.tensorboard=true"]
    for name, *how in (("apart", "search.fused=off"), ("fused", "search.fused=2", *tracked)):
        out = run_sweep_command(sweep_file, f"name={name}", *how, capsys=capsys)
        assert "step 20, a generation's end" in out
        study = look_into(tmp_path / "runs" / name)
        assert {moved.step for moved in study.moves} == {20}
        assert all(run.outcome == "finished" for run in study.runs)
        trials = tmp_path / "runs" / name / "trials"
        found[name] = study.moves, {run.name: losses(trials / run.name) for run in study.runs}
    assert found["fused"][0] == found["apart"][0]
    for name, apart in found["apart"][1].items():
        assert len(apart) == 40, "no step is missing or doubled"
        assert found["fused"][1][name] == pytest.approx(apart, rel=1e-3)  # 40 steps
        assert found["fused"][1][name][:5] == pytest.approx(apart[:5], rel=1e-5)
        kept = tmp_path / "runs/fused/trials" / name
        parts = {path.name.rpartition("-")[2] for path in kept.glob("wandb/offline-run-*")}
        assert len(parts) == 1, "a run of its own beside the others', the same in both generations"
        assert list(kept.glob("tensorboard/events.*"))
    # The one that took over goes on where the other was, with the rate of its own.
    (moved,) = found["apart"][0]
    source, target = (read_metrics(tmp_path / "runs/apart/trials" / name) for name in (moved.source, moved.run))
    rates = [record["learning_rate"] for record in target if "loss" in record]
    theirs = [record["learning_rate"] for record in source if "loss" in record]
    assert rates[19] != pytest.approx(theirs[19])
    assert rates[20] / theirs[20] in (pytest.approx(0.8), pytest.approx(1.2), pytest.approx(1.0))
