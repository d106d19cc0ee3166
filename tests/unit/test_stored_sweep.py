"""A sweep's directory in an object store, without Ray: kept alike, one driver, and requests from other machines."""

import shutil
import time

import pytest
from s3 import s3_server
from tiny import RUN_OF_SWEEPS

from ftray.cli.main import main
from ftray.config import RunConfig, load_sweep
from ftray.errors import FtrayError, UserError
from ftray.storage import ObjectStore, lease
from ftray.sweep import launch, prepare, store as stored_sweep
from ftray.sweep.launch import claim_directory, look_into, run_sweep
from ftray.sweep.prepare import PreparedSweep, sweep_directory
from ftray.sweep.store import StoredSweep
from ftray.sweep.study import Study
from ftray.sweep.trials import Report
from ftray.train.runs.store import run_store


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(stored_sweep, "SYNC_S", 0.05)
    (tmp_path / "run.yaml").write_text(RUN_OF_SWEEPS)
    monkeypatch.setattr(lease, "RENEWED_EVERY_S", 0.3)
    with s3_server("bucket") as bucket:
        url = f"{bucket}/{tmp_path.name}"
        path = tmp_path / "sweep.yaml"
        path.write_text(
            f"kind: sweep\nname: s\nrun: {tmp_path}/run.yaml\noverrides: {{runs_dir: {url}/runs}}\n"
            "space: {optimizer.learning_rate: [1e-3, 1e-4, 1e-5]}\nsearch: {algorithm: grid}\n"
        )
        yield load_sweep(path)


def to_open(sweep) -> tuple[StoredSweep, RunConfig]:
    """As a driver begins."""
    base_run = sweep[1].first_run(sweep[0])
    stored = StoredSweep(base_run.runs_dir, base_run.name)
    return stored, base_run


def finish(study: Study, name: str) -> None:
    study.report(name, Report(40, 0.5, 4000, 20.0))
    study.end(name, "finished")


def command(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["sweep", *words])
    return ended.value.code or 0


def wait_for(condition, *, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_it_goes_on_on_another_machine_and_hears_requests_from_a_third(sweep, tmp_path, capsys):
    stored, base_run = to_open(sweep)
    store = ObjectStore(stored.url)
    with stored.opened(refusal="s is running already"):
        directory = stored.directory
        claim_directory(directory, PreparedSweep(*sweep, base_run))
        study = Study(*sweep, directory)
        run = study.next_run()
        assert run is not None
        assert study.config_of(run).runs_dir == f"{stored.url}/trials"
        assert study.artifact_of(run) == f"{stored.url}/trials/t000/adapter"
        finish(study, run.name)
        wait_for(lambda: b"finished" in (store.read("trials.jsonl") or b""))
        another = StoredSweep(base_run.runs_dir, "s")
        with pytest.raises(UserError, match="s is running already"), another.opened(refusal="s is running already"):
            raise AssertionError("two drivers")

        # from a third machine, while it runs
        assert command("clone-trial", "s", "t000", "optimizer.learning_rate=0.5", "--runs-dir", base_run.runs_dir) == 0
        assert list(store.keys("requests"))
        wait_for(lambda: study._requests.trials)
        cloned = study.next_run()
        assert cloned is not None
        assert study.point_of(cloned) == {"optimizer.learning_rate": 0.5}
        wait_for(lambda: not list(store.keys("requests")))  # once the journal tells of it
        assert b"0.5" in (store.read("trials.jsonl") or b"")
        assert command("stop-trial", "s", "t001", "--runs-dir", base_run.runs_dir) == 0
        assert store.find("trials/t001/stop_request") is not None
        reached = Report(10, 0.7, 1000, 5.0)
        wait_for(lambda: study.report(cloned.name, reached) == "by the user")
    assert store.find("driver.lease") is None

    shutil.rmtree(stored.directory)  # as if this were another machine
    again, _ = to_open(sweep)
    with again.opened(refusal="s is running already"):
        claim_directory(again.directory, PreparedSweep(*sweep, base_run))
        study = Study(*sweep, again.directory)
        assert [trial.name for trial in study.trials if trial.is_finished] == ["t000"]
        assert study.next_run() is not None
        assert study.run("t001").outcome == "stopped", "called off before the driver went"
        changed = load_sweep(tmp_path / "sweep.yaml", ["search.seed=4"])
        with pytest.raises(UserError, match=r"another config:\n.*search.seed"):
            claim_directory(again.directory, PreparedSweep(*changed, base_run))
    assert command("stop-trial", "other", "t001", "--runs-dir", base_run.runs_dir) == 2
    assert f"other: no such sweep in {base_run.runs_dir}" in capsys.readouterr().err


def overtaken(stored: StoredSweep, store: ObjectStore) -> None:
    store.write("driver.lease", b'{"holder": "another"}')
    store.write("trials.jsonl", b"another's\n")
    (stored.directory / "trials.jsonl").write_text("ours\n")


def test_a_driver_that_another_replaced_ends_and_changes_nothing_more(sweep, monkeypatch):
    stored, base_run = to_open(sweep)
    store = ObjectStore(stored.url)

    def drive() -> None:
        with stored.opened(refusal="s"):
            claim_directory(stored.directory, PreparedSweep(*sweep, base_run))
            overtaken(stored, store)
            wait_for(lambda: False)  # it does not come to the end of that

    with pytest.raises(FtrayError, match="another driver has taken this sweep over") as ended:
        drive()
    assert isinstance(ended.value.__context__, KeyboardInterrupt)
    assert store.read("trials.jsonl") == b"another's\n"

    monkeypatch.setattr(stored_sweep, "SYNC_S", 60.0)  # found out at the end only
    store.delete("driver.lease")
    stored, base_run = to_open(sweep)
    with pytest.raises(FtrayError, match="another driver has taken this sweep over"), stored.opened(refusal="s"):
        overtaken(stored, store)
    assert store.read("trials.jsonl") == b"another's\n"


def test_a_run_that_the_journal_lost_makes_room_for_the_one_that_has_its_name_now(sweep, tmp_path):
    stored, _ = to_open(sweep)
    study = Study(*sweep, tmp_path)
    run = study.next_run()
    assert run is not None
    config = study.config_of(run)
    store = ObjectStore(f"{stored.url}/trials/t000")
    runs = run_store(config.runs_dir)
    runs.forget_leftover(config)  # there is nothing
    for other in (config.model_copy(update={"seed": 9}), config):
        store.write("config.json", other.model_dump_json().encode())
        store.write("checkpoints/step-2/manifest.json", b"{}")
        runs.forget_leftover(config)
        assert bool(store.entries()) is (other is config)


def test_a_population_does_not_go_in_a_store(sweep, tmp_path):
    path = tmp_path / "sweep.yaml"
    population = ["search={algorithm: random, trials: 4, scheduler: pbt}"]
    ranges = ["space={optimizer.learning_rate: {log_uniform: [1e-5, 1e-3]}}"]
    with pytest.raises(UserError, match=r"search.scheduler pbt: .*overrides.runs_dir="):
        run_sweep(*load_sweep(path, [*population, *ranges]), log=print)


def test_elsewhere_a_sweep_is_looked_into_where_it_lies(sweep, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "search", lambda *_, **__: None)
    monkeypatch.setattr(prepare, "check_before_anything", lambda *_: None)

    class session:
        def __init__(self, run): ...
        def __enter__(self): ...
        def __exit__(self, *_): ...

    monkeypatch.setattr(launch, "ray_session", session)
    study = run_sweep(*sweep, log=print)
    assert study.uri == f"{sweep[1].first_run(sweep[0]).runs_dir}/s"
    assert {found.key for found in ObjectStore(study.uri).entries()} == {
        "sweep.json",
        "environment.json",
        "sweep.html",
    }
    assert look_into(sweep_directory(*sweep)).trials == []
