"""Copies of objects on a machine, against an S3 server: fetched once, whole or absent, within a limit."""

import multiprocessing
import os
import shutil
from pathlib import Path

import pytest
from s3 import s3_server

from ftray.errors import DataError, FtrayError, UserError
from ftray.storage import LocalCopies, ObjectStore, local_copies, objects


@pytest.fixture(scope="module")
def s3():
    with s3_server("models") as url:
        yield url


@pytest.fixture
def url(s3, tmp_path) -> str:
    store = ObjectStore(f"{s3}/{tmp_path.name}")
    store.write("config.json", b"{}")
    store.write("model.safetensors", bytes(range(256)) * 1000)
    store.write("notes/readme.md", b"not wanted")
    return f"{s3}/{tmp_path.name}"


def top(key: str) -> bool:
    return "/" not in key


def fetch_and_report(url: str, root: Path, said) -> None:
    LocalCopies(root, None).fetch(url, wanted=top, log=said.put)


def test_one_fetches_and_the_others_wait(url, tmp_path):
    fork = multiprocessing.get_context("spawn")
    said = fork.Queue()
    processes = [fork.Process(target=fetch_and_report, args=(url, tmp_path / "copies", said)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    reported = [said.get(timeout=1)]
    assert said.empty(), "fetched once"
    assert "fetching s3://models/" in reported[0]
    directory = LocalCopies(tmp_path / "copies", None).fetch(url, wanted=top)
    assert (directory / "model.safetensors").read_bytes() == bytes(range(256)) * 1000
    assert not (directory / "notes").exists()


def test_large_objects_come_in_parts(url, tmp_path, monkeypatch):
    monkeypatch.setattr(objects, "PART_BYTES", 10_001)
    directory = LocalCopies(tmp_path / "copies", None).fetch(url, wanted=top)
    assert (directory / "model.safetensors").read_bytes() == bytes(range(256)) * 1000


def test_what_was_begun_is_no_copy(url, tmp_path, monkeypatch):
    copies = LocalCopies(tmp_path / "copies", None)
    download = ObjectStore.download

    def break_off(self, found, path):
        if found.key == "model.safetensors":
            path.write_bytes(b"half")
            raise FtrayError("the network went")
        download(self, found, path)

    monkeypatch.setattr(ObjectStore, "download", break_off)
    with pytest.raises(FtrayError, match="the network went"):
        copies.fetch(url, wanted=top)
    assert copies.copies() == []
    monkeypatch.undo()
    assert (copies.fetch(url, wanted=top) / "model.safetensors").stat().st_size == 256_000


def test_objects_that_change_meanwhile_are_no_copy(url, tmp_path, monkeypatch):
    download = ObjectStore.download

    def overwrite(self, found, path):
        download(self, found, path)
        ObjectStore(url).write("config.json", b"{ }")

    monkeypatch.setattr(ObjectStore, "download", overwrite)
    copies = LocalCopies(tmp_path / "copies", None)
    with pytest.raises(FtrayError, match="changed while they were read"):
        copies.fetch(url, wanted=top)
    assert copies.copies() == []


def test_a_new_version_is_another_copy(url, tmp_path):
    copies = LocalCopies(tmp_path / "copies", None)
    old = copies.fetch(url, wanted=top)
    ObjectStore(url).write("config.json", b'{"new": 1}')
    new = copies.fetch(url, wanted=top)
    assert new != old
    assert (new / "config.json").read_bytes() == b'{"new": 1}'


def fetch_elsewhere(url: str, root: Path) -> Path:
    """In a process that has ended since: nobody holds what it fetched."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(fetch_here, (url, root))


def fetch_here(url: str, root: Path) -> Path:
    return LocalCopies(root, None).fetch(url, wanted=top)


def test_the_least_recently_used_makes_room_unless_it_is_in_use(s3, url, tmp_path):
    root = tmp_path / "copies"
    old = fetch_elsewhere(url, root)
    os.utime(old, (1, 1))
    second = f"{s3}/{tmp_path.name}-2"
    ObjectStore(second).write("config.json", bytes(200_000))
    limited = LocalCopies(root, 400_000)
    kept = limited.fetch(second, wanted=top)
    assert not old.exists()
    assert kept.exists()
    third = f"{s3}/{tmp_path.name}-3"
    ObjectStore(third).write("config.json", bytes(300_000))
    with pytest.raises(UserError, match="what is there is in use"):
        limited.fetch(third, wanted=top)
    assert kept.exists(), "this process reads it"


def test_what_is_not_there(s3, tmp_path, monkeypatch):
    copies = LocalCopies(tmp_path / "copies", None)
    with pytest.raises(UserError, match="nothing of that name"):
        copies.fetch(f"{s3}/absent/model")
    monkeypatch.setenv("FTRAY_CACHE_GIB", "much")
    with pytest.raises(UserError, match="FTRAY_CACHE_GIB: 'much' is no number"):
        local_copies(tmp_path)


def test_data_and_base_models_come_from_a_store(s3, tmp_path, monkeypatch, tiny_model, train_file):
    from ftray.data.sources import check_source, load_rows, source_digest
    from ftray.model.base import check_base_name, prepare_base

    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path / "cache"))
    store = ObjectStore(f"{s3}/{tmp_path.name}")
    for path in Path(tiny_model).iterdir():
        store.write(f"tiny/{path.name}", path.read_bytes())
    store.write("train.jsonl", Path(train_file).read_bytes())
    model, rows = f"{s3}/{tmp_path.name}/tiny", f"{s3}/{tmp_path.name}/train.jsonl"
    check_base_name(model)
    assert prepare_base(model).fingerprint == prepare_base(str(tiny_model)).fingerprint
    check_source("data.train", rows)
    assert list(load_rows("data.train", rows)) == list(load_rows("data.train", str(train_file)))
    assert source_digest(rows, None) == source_digest(str(train_file), None)
    with pytest.raises(DataError, match=r"data\.train: s3://.*absent\.jsonl: there is nothing of that name"):
        load_rows("data.train", f"{s3}/absent.jsonl")
    with pytest.raises(UserError, match=r"base_model: s3://.*nothing of that name"):
        prepare_base(f"{s3}/absent")
    shutil.rmtree(tmp_path / "cache")
