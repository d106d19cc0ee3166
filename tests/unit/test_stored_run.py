"""The parts under runs in an object store, against an S3 server: files kept alike, one holder of a lease, checkpoints
that count when their manifest is there."""

import dataclasses
import json
import os
import socket
import time

import pytest
from s3 import s3_server

from ftray.artifacts.publish import publish_adapter
from ftray.config import RunConfig, parse_config
from ftray.errors import DamagedError, FtrayError, UserError
from ftray.model.adapters.directory import local_adapter
from ftray.model.adapters.weights import read_adapter
from ftray.registry import Registry
from ftray.storage import AlreadyExists, ObjectStore, lease, write_json, write_manifest
from ftray.storage.lease import Lease, describe_process, held
from ftray.storage.mirror import Mirror
from ftray.storage.objects import state_of
from ftray.tracking.events import read_events, record_driver_event, record_event
from ftray.tracking.metrics import MetricsFollower
from ftray.train.checkpoints.listing import first_whole
from ftray.train.checkpoints.stored import StoredCheckpoints
from ftray.train.hooks.watchdog import HangReader, hang_file
from ftray.train.job import TrainJob
from ftray.train.runs.handle import RunHandle
from ftray.train.runs.rank_directory import WorkerNotes, directory_of_rank
from ftray.train.runs.store import run_store
from ftray.train.runs.uri import local_directory, local_root


@pytest.fixture(scope="module")
def s3():
    with s3_server("bucket") as url:
        yield url


@pytest.fixture
def url(s3, tmp_path, monkeypatch) -> str:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return f"{s3}/{tmp_path.name}"


def test_what_has_changed_goes_over_and_a_reader_keeps_its_place(url, tmp_path):
    writer, reader = Mirror(url, tmp_path / "writer"), Mirror(url, tmp_path / "reader")
    (tmp_path / "writer").mkdir()
    log = tmp_path / "writer/metrics.jsonl"
    log.write_text('{"step": 1}\n')
    follower = MetricsFollower(tmp_path / "reader")
    writer.push(["metrics.jsonl", "absent"])
    reader.pull(["metrics.jsonl", "absent"])
    assert follower.poll() == [{"step": 1}]
    with log.open("a") as file:
        file.write('{"step": 2}\n')
    writer.push(["metrics.jsonl"], at_once=True)
    reader.pull(["metrics.jsonl"])
    assert follower.poll() == [{"step": 2}], "told once, though the object was written anew"
    log.write_text('{"step": 1}\n')  # a run that was resumed forgets steps
    writer.push(["metrics.jsonl"], at_once=True)
    reader.pull(["metrics.jsonl"])
    assert follower.poll() == [{"step": 1}]

    reader.store.write("metrics.jsonl", b"another's")  # not changed here: it is not sent again
    writer.push(["metrics.jsonl"], at_once=True)
    assert reader.store.read("metrics.jsonl") == b"another's"
    (tmp_path / "reader/metrics.jsonl").unlink()
    reader.pull(["metrics.jsonl"])
    reader.forget(["metrics.jsonl"])
    reader.pull(["metrics.jsonl"])
    assert not (tmp_path / "reader/metrics.jsonl").exists()


def test_a_large_file_is_not_sent_every_time(url, tmp_path, monkeypatch):
    monkeypatch.setattr("ftray.storage.mirror.BYTES_PER_S", 1)
    mirror = Mirror(url, tmp_path)
    (tmp_path / "trace").write_bytes(b"a" * 100)
    mirror.push(["trace"])
    (tmp_path / "trace").write_bytes(b"b" * 100)
    mirror.push(["trace"])
    assert mirror.store.read("trace") == b"a" * 100
    mirror.push(["trace"], at_once=True)
    assert mirror.store.read("trace") == b"b" * 100


def test_a_lease_has_one_holder(url, monkeypatch):
    monkeypatch.setattr(lease, "RENEWED_EVERY_S", 0.2)
    monkeypatch.setattr(lease, "LOOK_S", 0.1)
    store = ObjectStore(url)
    with held(store, "lease", refusal="demo is running") as first:
        begun = time.monotonic()
        with pytest.raises(UserError, match=rf"demo is running \(process {os.getpid()} on {socket.gethostname()}\)"):
            Lease(store, "lease").acquire("demo is running")
        assert time.monotonic() - begun < 5
        assert not first.is_lost
    assert store.read("lease") is None
    with held(store, "lease", refusal="demo is running"):
        pass


def test_a_lease_is_taken_from_a_holder_that_is_gone(url, monkeypatch):
    monkeypatch.setattr(lease, "LOOK_S", 0.1)
    store = ObjectStore(url)
    gone = describe_process() | {"process": 2**22 + 1, "holder": "x"}
    store.write("lease", json.dumps(gone).encode())
    begun = time.monotonic()
    with held(store, "lease", refusal=""):  # of this machine: it is known at once
        assert time.monotonic() - begun < 5
    monkeypatch.setattr(lease, "LAPSES_S", 1.0)
    store.write("lease", json.dumps(gone | {"machine": "another of the same name"}).encode())
    begun = time.monotonic()
    with held(store, "lease", refusal=""):  # of another one: it does not renew it
        assert time.monotonic() - begun >= 1.0


def test_of_two_who_take_a_lease_one_has_it(url, monkeypatch):
    monkeypatch.setattr(lease, "RENEWED_EVERY_S", 0.1)
    store = ObjectStore(url)
    state = store.create("lease", b"{}")
    assert state == store.find("lease").state
    assert state_of({"e_tag": "a", "version": "1"}) == {"e_tag": "a", "version": "1"}  # Google's store wants the latter
    store.replace("lease", b'{"a": 1}', state=state)
    with pytest.raises(AlreadyExists):
        store.replace("lease", b'{"b": 1}', state=state)
    store.delete("lease")
    with held(store, "lease", refusal="") as stood_still:
        store.write("lease", b'{"holder": "another"}')
        end = time.monotonic() + 5
        while not stood_still.is_lost and time.monotonic() < end:
            time.sleep(0.05)
        assert stood_still.is_lost
    assert store.read("lease") == b'{"holder": "another"}', "the other's stays"


def a_run(url: str) -> RunConfig:
    text = f"kind: run\nname: demo\nbase_model: m\nepochs: 1\nruns_dir: {url}\ndata: {{train: x.jsonl}}\n"
    return parse_config(text, kind="run", source="x")


def opened(url: str):
    return run_store(url).open(a_run(url))


def write_tokens(directory):
    directory.mkdir()
    (directory / "ids.bin").write_bytes(b"tokens")
    return directory


def a_job(**parts):
    fixed = dict.fromkeys(field.name for field in dataclasses.fields(TrainJob))
    return TrainJob(**fixed | parts)


def write_checkpoint(directory, step, *, ranks=2):
    for rank in range(ranks):
        path = directory / f"state/rank-{rank}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"{step} {rank}".encode())
    write_json(directory / "trainer.json", {"step": step, "data_digest": "d", "world_size": ranks, "zero_stage": 2})


def save(checkpoints, directory, step, *, keep=2, ranks=2):
    write_checkpoint(directory, step, ranks=ranks)
    checkpoints.upload(directory, step)
    write_manifest(directory, metadata={"step": step})
    checkpoints.complete(directory, step, keep=keep)


def test_a_checkpoint_counts_once_its_manifest_is_there(url, tmp_path):
    checkpoints = StoredCheckpoints(url)
    store = ObjectStore(url)
    for step in (2, 4, 6):
        save(checkpoints, tmp_path / str(step), step)
    assert checkpoints.list() == [f"{url}/checkpoints/step-6", f"{url}/checkpoints/step-4"], "of these two are kept"
    assert not [found for found in store.entries() if "step-2/" in found.key]

    write_checkpoint(tmp_path / "8", 8)
    checkpoints.upload(tmp_path / "8", 8)  # cut off before its manifest
    assert checkpoints.list()[0].endswith("step-6")
    newest = checkpoints.newest(tmp_path / "driver")
    assert newest == tmp_path / "driver/checkpoints/step-6"
    assert sorted(path.name for path in newest.iterdir()) == ["manifest.json", "trainer.json"]
    opened = checkpoints.open(checkpoints.list()[0], share=(0, 2))
    assert (opened / "state/rank-1.safetensors").read_bytes() == b"6 1"

    store.write("checkpoints/step-6/state/rank-1.safetensors", b"6 x")  # its size is right, its content is not
    with pytest.raises(DamagedError, match=r"rank-1\.safetensors: content differs"):
        checkpoints.open(checkpoints.list()[0], share=(0, 2))
    store.delete("checkpoints/step-6/state/rank-1.safetensors")
    assert checkpoints.newest(tmp_path / "driver").name == "step-4"

    # Training went on from step 4: what is later was damaged, and goes.
    save(checkpoints, tmp_path / "5", 5, ranks=1)
    assert [place.rpartition("/")[2] for place in checkpoints.list()] == ["step-5", "step-4"]
    save(checkpoints, tmp_path / "5", 5, ranks=3)
    save(checkpoints, tmp_path / "again", 5, ranks=1)
    assert sorted(found.key for found in store.entries() if "step-5/state" in found.key) == [
        "checkpoints/step-5/state/rank-0.safetensors"
    ], "of an earlier save by more ranks"


def test_a_copy_that_cannot_be_made_is_no_damaged_checkpoint(url, tmp_path, monkeypatch):
    """Else one full disk would begin the run again, and its first save remove what is there."""
    checkpoints = StoredCheckpoints(url)
    save(checkpoints, tmp_path / "4", 4)
    save(checkpoints, tmp_path / "6", 6)

    def opened(place):
        return checkpoints.open(place, share=(0, 1))

    monkeypatch.setenv("FTRAY_CACHE_GIB", "0")
    with pytest.raises(UserError, match="raise FTRAY_CACHE_GIB"):
        first_whole(checkpoints.list(), opened=opened)
    monkeypatch.delenv("FTRAY_CACHE_GIB")
    ObjectStore(url).write("checkpoints/step-6/state/rank-0.safetensors", b"6 x")
    found = first_whole(checkpoints.list(), opened=opened)
    assert (found / "state/rank-0.safetensors").read_bytes() == b"4 0"


def test_a_driver_that_was_replaced_writes_nothing_more(url, monkeypatch):
    monkeypatch.setattr(lease, "RENEWED_EVERY_S", 100)
    store = ObjectStore(f"{url}/demo")

    def replaced() -> None:
        with opened(url) as run:
            store.write("driver.lease", b'{"holder": "another"}')
            record_driver_event(run.path, "stopped")
            run.sync(at_once=True)

    with pytest.raises(FtrayError, match="another driver has taken this run over"):
        replaced()
    assert store.read("driver.lease") == b'{"holder": "another"}'
    assert store.read("driver_events.jsonl") is None


def test_notes_of_rank_0_reach_the_driver_and_a_request_to_stop_reaches_rank_0(url, tmp_path, monkeypatch):
    for module in ("object_store", "rank_directory"):
        monkeypatch.setattr(f"ftray.train.runs.{module}.SYNC_S", 0.1)
    with opened(url) as run:
        directory = run.path
        worker = tmp_path / "worker"
        worker.mkdir()
        notes = WorkerNotes(run.uri, worker, rank=0)
        assert run_store(url).share(write_tokens(tmp_path / "tokens")) == f"{url}/.tokens/tokens"
        job = notes.begin(a_job(train_data=f"{url}/.tokens/tokens"))
        assert (job.train_data / "ids.bin").read_bytes() == b"tokens"
        (worker / ".stop_request.x1").touch()  # of a write that is not finished
        record_event(worker, "workers_started")
        record_driver_event(directory, "hang", message="it stood still")
        (worker / "scratch").mkdir()
        (worker / "scratch/large").write_bytes(b"not a note")
        (worker / "tensorboard").mkdir()
        (worker / "tensorboard/events").write_bytes(b"a note")
        (directory / "stop_request").touch()
        end = time.monotonic() + 10
        while not ((worker / "stop_request").is_file() and len(read_events(directory)) == 2):
            assert time.monotonic() < end
            run.sync()
            time.sleep(0.05)
        notes.close()
        assert [event["event"] for event in read_events(directory)] == ["workers_started", "hang"]
    keys = {found.key for found in ObjectStore(f"{url}/demo").entries()}
    ours = {"config.json", "environment.json", "driver_events.jsonl", "stop_request"}
    assert keys == {"events.jsonl", "tensorboard/events"} | ours

    # The next driver, on another machine: it finds the events, and asks nobody to stop.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    assert not local_root(url).exists()
    with opened(url) as other:
        assert [event["event"] for event in read_events(other.path)] == ["workers_started", "hang"]
        assert not (other.path / "stop_request").exists()


def test_a_rank_that_stood_still_is_named_by_the_one_after_it(url, monkeypatch):
    """It ends inside faulthandler, and can send nothing; the ranks that Ray starts then find what it wrote."""
    monkeypatch.setattr("ftray.train.hooks.watchdog.SILENT_AFTER_S", 0.0)
    stacks = ['Current thread 0x1:\n  File "/x/torch/distributed/c10d.py", line 7 in all_reduce\n']
    stacks += ['Current thread 0x2:\n  File "/x/data.py", line 3 in read\n']
    uri, reader = run_store(url).uri("demo"), HangReader(local_directory(url, "demo"))

    def hang(attempt: str) -> None:
        for rank, stack in enumerate(stacks):
            path = hang_file(directory_of_rank(uri, rank, attempt=attempt), rank)
            path.parent.mkdir()
            path.write_text(stack)

    def start_again(run: RunHandle, attempt: str) -> str | None:
        for rank in range(2):
            directory_of_rank(uri, rank, attempt=attempt)
        run.sync(at_once=True)
        return reader.poll(world_size=2)

    with opened(url) as run:
        for _ in range(2):  # the same again is another
            hang("a")
            run.sync(at_once=True)
            assert reader.poll(world_size=2) is None
            assert start_again(run, "a") == "rank 1 stands still at /x/data.py:3 in read"
            assert start_again(run, "a") is None
        hang("a")
        assert start_again(run, "b") is None, "a driver before this one had it"


def test_an_adapter_in_a_store_is_published_with_its_lineage(url, tmp_path, adapters):
    store = ObjectStore(f"{url}/demo")
    for path in adapters["r4"].iterdir():
        store.write(f"adapter/{path.name}", path)
    finished = {"name": "demo", "steps": 4, "final_loss": 1.0, "final_eval_loss": None, "tokens_per_s": 1.0}
    store.write("result.json", json.dumps(finished).encode())
    store.write("config.json", b'{"objective": {"type": "sft"}, "data": {"train": "x"}}')
    store.write("environment.json", b"{}")
    store.write("checkpoints/step-4/state/rank-0.safetensors", b"not fetched")
    directory = local_adapter(f"{url}/demo/adapter/")
    assert not (directory.parent / "checkpoints").exists()
    version = publish_adapter(Registry(f"{url}/registry"), "support", directory)
    assert version.metadata["lineage"]["run"] == "demo"
    assert version.metadata["rank"] == 4
    # On another machine, a run that goes on from this version has the registry's address of it.
    place = Registry(f"{url}/registry").place(version)
    assert place == f"{url}/registry/adapters/support/versions/1/files"
    assert read_adapter(local_adapter(place), label="x").max_rank == 4
    assert local_adapter("support@1") is None
    with pytest.raises(UserError, match=r"demo/adaptr: there is nothing of that name"):
        local_adapter(f"{url}/demo/adaptr")
    assert local_adapter(adapters["r4"]) == adapters["r4"]


def test_a_store_that_cannot_be_had_is_told(monkeypatch, s3):
    with (
        pytest.raises(UserError, match=r"^runs_dir: s3://no-such-bucket/runs/demo"),
        opened("s3://no-such-bucket/runs"),
    ):
        pass
