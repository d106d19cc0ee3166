"""Saves beside the training: a failed one is told and left out, the last one must succeed; shards fit together."""

import threading

import pytest
import torch
from fake_engine import FakeEngine

from ftray.config import parse_config
from ftray.errors import FtrayError
from ftray.storage import remove_unlisted, verify_directory, write_manifest
from ftray.train.checkpoints import saver as saver_module
from ftray.train.checkpoints.saver import Saver
from ftray.train.engine.state import MASTER, Shard, ShardedState, write_shard
from ftray.train.loss_guard import LossGuard, name_rows, suspects


@pytest.fixture
def make(tmp_path):
    config = parse_config(
        "kind: run\nname: a\nbase_model: m\nmax_steps: 1\nadapter: null\ndata: {train: x}\n", kind="run", source="x"
    )
    published: list[int] = []
    failures: list[str] = []

    def publish(directory, step):
        directory.rename(tmp_path / f"step-{step}")
        published.append(step)

    engine = FakeEngine()
    saver = Saver(
        engine,
        config,
        None,  # pyright: ignore
        data_digest="d",
        scratch=tmp_path / "scratch",
        publish=publish,
        upload=lambda directory, step: None,
        on_failure=lambda step, message: failures.append(message),
    )
    return engine, saver, published, failures


def test_the_state_saved_is_that_of_its_step(make, tmp_path, monkeypatch):
    """The next step changes the weights while the files are written."""
    engine, saver, published, _ = make
    goes_on = threading.Event()
    real = saver_module.write_snapshot
    monkeypatch.setattr(saver_module, "write_snapshot", lambda *a, **k: (goes_on.wait(10), real(*a, **k))[1])
    engine.value = 1.0
    saver.begin(5)
    engine.value = 2.0
    saver.poll()
    assert published == [], "not written yet: the training goes on"
    goes_on.set()
    saver.finish(last=True)
    assert published == [5]
    assert verify_directory(tmp_path / "step-5").metadata["step"] == 5
    assert ShardedState(tmp_path / "step-5").whole(MASTER, "w").tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_a_full_disk_costs_one_checkpoint_and_not_the_run(make, tmp_path, monkeypatch):
    _, saver, published, failures = make

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(saver_module, "write_snapshot", full)
        saver.begin(5)
        saver.finish(last=False)
    assert published == []
    assert "the checkpoint of step 5 could not be written by rank 0" in failures[0]
    assert "No space left" in failures[0]
    saver.begin(10)
    saver.finish(last=True)
    assert published == [10]
    monkeypatch.setattr(saver_module, "write_snapshot", full)
    saver.begin(15)
    with pytest.raises(FtrayError, match=r"step 15 .*make room"):
        saver.finish(last=True)


def test_a_store_that_refuses_costs_one_checkpoint_and_not_the_run(make, monkeypatch):
    _, saver, published, failures = make

    def refuse(directory, step):
        raise FtrayError("s3://bucket: cannot be written")

    with monkeypatch.context() as patched:
        patched.setattr(saver, "_upload", refuse)  # beside the training
        saver.begin(5)
        saver.finish(last=False)
        patched.setattr(saver, "_upload", lambda directory, step: None)
        patched.setattr(saver, "_publish", refuse)  # its manifest
        saver.begin(10)
        saver.finish(last=False)
        saver.begin(15)
        with pytest.raises(FtrayError, match="s3://bucket: cannot be written"):
            saver.finish(last=True)
    assert published == []
    assert len(failures) == 2
    assert "step 5 could not be written by rank 0: s3://bucket" in failures[0]
    saver.begin(20)
    saver.finish(last=True)
    assert published == [20]


def test_shards_of_two_ranks_are_read_in_any_range(tmp_path):
    whole = torch.arange(10.0)
    write_shard(tmp_path, Shard({"master.w": whole[:6]}, {"w": 0}, {"w": [5, 2]}), rank=0)
    write_shard(tmp_path, Shard({"master.w": whole[6:]}, {"w": 6}, {"w": [5, 2]}), rank=1)
    write_manifest(tmp_path, metadata={})
    # of an earlier save by more ranks: not in the manifest, so not read
    write_shard(tmp_path, Shard({"master.w": -whole[6:]}, {"w": 6}, {"w": [5, 2]}), rank=2)
    state = ShardedState(tmp_path)
    assert torch.equal(state.whole(MASTER, "w"), whole.view(5, 2))
    assert torch.equal(state.read(MASTER, "w", 4, 8), whole[4:8])
    remove_unlisted(tmp_path)
    assert sorted(p.name for p in (tmp_path / "state").iterdir()) == [
        "rank-00000.safetensors", "rank-00001.safetensors"
    ]  # fmt: skip
    (tmp_path / "state" / "rank-00001.safetensors").unlink()
    write_manifest(tmp_path, metadata={})
    with pytest.raises(FtrayError, match=r"holds 2 of 4 elements of master\.w"):
        ShardedState(tmp_path).read(MASTER, "w", 4, 8)
    with pytest.raises(FtrayError, match="has no parameter v"):
        state.whole(MASTER, "v")


def test_the_guard_knows_a_bad_loss():
    from ftray.config.run import GuardConfig

    guard = LossGuard(GuardConfig(spike_factor=2.0))
    assert guard.problem(float("nan")) == "the loss is nan"
    assert guard.problem(float("inf")) == "the loss is inf"
    assert all(guard.problem(1.0 + 0.01 * step) is None for step in range(20))
    assert "over guard.spike_factor (2)" in str(guard.problem(2.5))
    assert guard.problem(1.9) is None
    assert LossGuard(GuardConfig()).problem(1e9) is None, "only NaN and infinity without a factor"


def test_the_rows_behind_a_bad_loss_are_named():
    nan = float("nan")
    assert suspects([(1.0, [4, 5]), (nan, [9, 2]), (nan, [7])]) == [2, 7, 9]
    assert suspects([(1.0, [4]), (6.0, [8, 1])]) == [1, 8]
    assert suspects([]) == []
    assert name_rows(list(range(1, 13))) == "1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 2 more"


def test_a_manifest_moves_when_the_files_of_all_ranks_are_there(tmp_path, monkeypatch):
    """A rank that dies in between leaves a checkpoint that does not count, not one that is damaged."""
    from types import SimpleNamespace

    import ray.train

    from ftray.train.on_ray.rank_run import SharedRun

    target, scratch = tmp_path / "checkpoints" / "step-5", tmp_path / "scratch"
    for name in ("manifest.json", "state/rank-00000.safetensors", "adapter/manifest.json"):
        (scratch / name).parent.mkdir(parents=True, exist_ok=True)
        (scratch / name).write_text('{"files": []}')
    found = []

    def gather(problem):
        found.append(sorted(str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()))
        return [problem, None]

    def report(metrics, *, checkpoint, checkpoint_dir_name, checkpoint_upload_fn):
        checkpoint_upload_fn(checkpoint, checkpoint_dir_name)

    monkeypatch.setattr(ray.train, "report", report)
    monkeypatch.setattr("ftray.train.on_ray.rank_run.remove_unlisted", lambda directory: None)
    run = SharedRun(SimpleNamespace(run_directory=tmp_path), rank=0)  # pyright: ignore
    run.publish(SimpleNamespace(gather=gather), scratch, 5)  # pyright: ignore
    assert found == [["adapter/manifest.json", "state/rank-00000.safetensors"]]
    assert (target / "manifest.json").is_file()
    broken = SimpleNamespace(gather=lambda problem: [problem, "rank 1: no room"])
    with pytest.raises(FtrayError, match="step 6 could not be completed: rank 1: no room"):
        run.publish(broken, scratch, 6)  # pyright: ignore
    assert not (tmp_path / "checkpoints" / "step-6" / "manifest.json").exists()
