import subprocess
import sys
import time

import pytest

from ftray.errors import FtrayError
from ftray.storage import ObjectStore, read_json, verify_directory, write_json, write_manifest


@pytest.fixture
def whole(tmp_path):
    directory = tmp_path / "d"
    (directory / "sub").mkdir(parents=True)
    (directory / "a.bin").write_bytes(b"x" * 1000)
    (directory / "sub" / "manifest.json").write_text("{}")  # a nested one is a file like any other
    write_manifest(directory, metadata={"step": 3})
    return directory


def test_a_whole_directory_is_proved(whole):
    manifest = verify_directory(whole)
    assert manifest.metadata == {"step": 3}
    assert [entry.path for entry in manifest.files] == ["a.bin", "sub/manifest.json"]
    assert manifest.num_bytes == 1002


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "a.bin").write_bytes(b"x" * 999), "truncated"),
        (lambda d: (d / "a.bin").write_bytes(b"y" * 1000), "damaged"),
        (lambda d: (d / "a.bin").unlink(), "missing"),
        (lambda d: (d / "manifest.json").unlink(), "never completed"),
        (lambda d: (d / "manifest.json").write_text("{"), "damaged"),
    ],
)
def test_any_damage_is_found(whole, damage, message):
    damage(whole)
    with pytest.raises(FtrayError, match=message):
        verify_directory(whole)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"a": object()})
    assert read_json(tmp_path / "x.json") == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


RACE = """
import sys, time
from ftray.storage import AlreadyExists, ObjectStore
store = ObjectStore(sys.argv[1])
time.sleep(max(0, float(sys.argv[2]) - time.time()))  # all at one moment
try:
    store.create("claim", sys.argv[3].encode())
    print("won")
except AlreadyExists:
    print("lost")
"""


def test_one_of_many_racing_processes_wins(tmp_path):
    start = str(time.time() + 1.5)
    racers = [
        subprocess.Popen([sys.executable, "-c", RACE, str(tmp_path), start, str(i)], stdout=subprocess.PIPE, text=True)
        for i in range(4)
    ]
    results = [racer.communicate(timeout=60)[0].strip() for racer in racers]
    assert sorted(results) == ["lost", "lost", "lost", "won"]
    assert (tmp_path / "claim").read_text() == str(results.index("won"))


def test_reading_and_listing(tmp_path):
    store = ObjectStore(str(tmp_path / "s"))
    assert store.read("a/b") is None
    store.create("a/b", b"1")
    store.write("a/c", b"2")
    assert store.read("a/c") == b"2"
    assert sorted(store.keys("a/")) == ["a/b", "a/c"]
