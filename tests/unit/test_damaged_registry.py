"""A registry whose files were lost, cut, changed, or mixed with another's: named, and nothing is applied on top."""

import json
import logging
import shutil
from pathlib import Path

import pytest
from s3 import s3_server
from typer.testing import CliRunner

from ftray.cli.main import app
from ftray.errors import AdapterError, DamagedError, NotFoundError, UserError
from ftray.registry import Registry
from ftray.registry.chain import FOLLOWS, REGISTRY, SEQ
from ftray.registry.verify import rebuild_journal, verify_registry
from ftray.storage import ObjectStore, atomic
from ftray.storage.manifest import MANIFEST


@pytest.fixture
def adapter(tmp_path) -> Path:
    directory = tmp_path / "adapter"
    directory.mkdir()
    (directory / "adapter_config.json").write_text("{}")
    (directory / "adapter_model.safetensors").write_bytes(b"weights")
    return directory


def filled(location: Path | str, adapter: Path, *, name: str = "a") -> Registry:
    """Entries 1 to 4: two versions, and both were @prod."""
    registry = Registry(str(location))
    for _ in range(2):
        registry.publish(name, adapter, metadata={"base_fingerprint": "f", "base_model": "tiny"})
    registry.promote(f"{name}@1", "prod", reason="the first")
    registry.promote(f"{name}@2", "prod")
    return registry


@pytest.fixture
def root(tmp_path, adapter) -> Path:
    filled(tmp_path / "registry", adapter)
    return tmp_path / "registry"


def entry(root: Path, seq: int) -> Path:
    return root / f"journal/{seq}.json"


def cut(root: Path) -> None:
    entry(root, 4).write_bytes(entry(root, 4).read_bytes()[:20])


def empty(root: Path) -> None:
    entry(root, 4).write_bytes(b"")


def of_another_shape(root: Path) -> None:
    entry(root, 4).write_text("[]")


def without_a_number(root: Path) -> None:
    entry(root, 4).write_text('{"type": "delete", "name": "zz"}')


def of_an_unknown_version(root: Path) -> None:
    changed = json.loads(entry(root, 4).read_text()) | {"number": 7}
    entry(root, 4).write_text(json.dumps(changed))


def a_gap(root: Path) -> None:
    entry(root, 3).unlink()


def renamed(root: Path) -> None:
    entry(root, 4).rename(entry(root, 5))
    entry(root, 3).rename(entry(root, 4))
    shutil.copy(entry(root, 4), entry(root, 3))


def changed_in_the_middle(root: Path) -> None:
    moved = json.loads(entry(root, 3).read_text()) | {"number": 2}
    entry(root, 3).write_text(json.dumps(moved))


def of_another_registry(root: Path) -> None:
    other = root.parent / "other"
    filled(other, root.parent / "adapter", name="b")
    shutil.copy(entry(other, 4), entry(root, 4))


DAMAGES = {
    cut: (4, "is cut short or overwritten"),
    empty: (4, "is empty"),
    of_another_shape: (4, "is no entry of a journal"),
    without_a_number: (4, "does not say that it follows 3.json"),
    of_an_unknown_version: (4, "alias of a@7, which is not there"),
    a_gap: (3, "is missing, and there are entries after it"),
    renamed: (4, "was written as 3.json"),
    changed_in_the_middle: (4, "does not follow 3.json as it is"),
    of_another_registry: (4, "belongs to another registry"),
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_journal_is_named_and_nothing_is_written_on_top(root, adapter, damage):
    seq, what = DAMAGES[damage]
    damage(root)
    before = sorted(path.name for path in (root / "journal").iterdir())
    for act in (
        lambda r: r.resolve("a@prod"),
        lambda r: r.promote("a@1", "prod"),
        lambda r: r.delete("a@1"),
        lambda r: r.publish("a", adapter, metadata={}),
    ):
        with pytest.raises(DamagedError, match=rf"journal/{seq}\.json: .*{what}.*ftray adapters verify"):
            act(Registry(str(root)))
    assert sorted(path.name for path in (root / "journal").iterdir()) == before
    assert any(what in problem for problem in verify_registry(str(root)).problems)


@pytest.mark.parametrize("damage", [cut, empty, of_another_shape, of_an_unknown_version], ids=lambda d: d.__name__)
def test_an_endpoint_keeps_its_last_state_and_tells_it_once(root, adapter, damage, caplog):
    endpoint = Registry(str(root), tolerant=True)
    assert str(endpoint.resolve("a@prod")) == "a@2"
    whole = entry(root, 4).read_bytes()
    Registry(str(root)).promote("a@1", "prod")
    shutil.move(entry(root, 5), entry(root, 4))  # a restore in progress, as far as the endpoint can see
    entry(root, 4).write_bytes(whole)
    shutil.copy(entry(root, 4), entry(root, 5))
    entry(root, 5).write_bytes({cut: whole[:20], empty: b"", of_another_shape: b"[]"}.get(damage, whole))
    with caplog.at_level(logging.WARNING, logger="ftray.registry"):
        for _ in range(5):
            assert str(endpoint.resolve("a@prod")) == "a@2"
            assert str(endpoint.resolve("a@1")) == "a@1"
            assert endpoint.names() == ["a"]
    assert len([record for record in caplog.records if "5.json" in record.message]) == 1


def test_a_journal_put_back_under_a_reader_is_found(root, adapter, monkeypatch, caplog):
    copy = root.parent / "copy"
    shutil.copytree(root, copy)
    endpoint, writer = Registry(str(root), tolerant=True), Registry(str(root))
    writer.promote("a@1", "prod")
    assert str(endpoint.resolve("a@prod")) == str(writer.resolve("a@prod")) == "a@1"
    shutil.rmtree(root)
    shutil.copytree(copy, root)  # entry 5 is gone; a@prod is a@2 here
    with pytest.raises(DamagedError, match=r"5\.json: is not what this process read there"):
        writer.publish("a", adapter, metadata={})
    assert not entry(root, 6).exists()
    monkeypatch.setattr("ftray.registry.reader.CONFIRMED_EVERY_S", 0)
    with caplog.at_level(logging.WARNING, logger="ftray.registry"):
        assert str(endpoint.resolve("a@prod")) == "a@1"
    assert "the journal was put back or replaced" in caplog.text
    # Others, who begin here, write on; the reader from before takes nothing of it.
    for _ in range(2):
        Registry(str(root)).promote("a@2", "prod")
    assert str(endpoint.resolve("a@prod")) == "a@1"
    assert str(Registry(str(root)).resolve("a@prod")) == "a@2"


def test_two_registries_copied_over_each_other(tmp_path, root, adapter):
    other = tmp_path / "other"
    filled(other, adapter, name="b")
    Registry(str(other)).promote("b@1", "prod")  # five entries, and the other has four
    shutil.copytree(root, other, dirs_exist_ok=True)
    with pytest.raises(DamagedError, match=r"5\.json: belongs to another registry"):
        Registry(str(other)).names()
    entry(other, 5).unlink()  # the copy is whole then, and b's versions are not in it
    problems = verify_registry(str(other)).problems
    assert [p.partition(":")[0] for p in problems] == ["b@1", "b@2"]
    journal = rebuild_journal(str(other))
    assert journal.versions == {"a": [1, 2], "b": [1, 2]}
    assert not verify_registry(str(other)).problems
    assert str(Registry(str(other)).resolve("a@prod")) == "a@2"
    assert str(Registry(str(other)).rollback("a", "prod")[1]) == "a@1"
    assert str(Registry(str(other)).publish("b", adapter, metadata={})) == "b@3"


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_journal_is_made_anew_from_what_is_there(root, adapter, damage):
    Registry(str(root)).tag("a@1", add=["kept"])
    damage(root)
    rebuild_journal(str(root))
    assert not verify_registry(str(root)).problems
    registry = Registry(str(root))
    assert registry.versions("a") == [1, 2]
    assert str(registry.publish("a", adapter, metadata={})) == "a@3"
    assert len(list(root.glob("journal-before-*/*.json"))) >= 4


def test_a_rebuild_that_was_interrupted_goes_on(root, monkeypatch):
    entry(root, 4).write_bytes(b"")
    real = ObjectStore.create

    def fails_at_2(self, key, content):
        if key == "journal/2.json":
            raise OSError("power cut")
        return real(self, key, content)

    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, "create", fails_at_2)
        with pytest.raises(OSError, match="power cut"):
            rebuild_journal(str(root))
    assert rebuild_journal(str(root)).aliases == {("a", "prod"): 1}  # as the old one said before its damage
    assert not verify_registry(str(root)).problems


def test_a_journal_of_the_first_ftray_is_read_as_it_is(root, adapter):
    for seq in range(1, 5):
        old = json.loads(entry(root, seq).read_text())
        entry(root, seq).write_text(json.dumps({k: old[k] for k in old if k not in ("seq", "registry", "follows")}))
    registry = Registry(str(root))
    assert str(registry.resolve("a@prod")) == "a@2"
    registry.promote("a@1", "prod")  # linked from here on
    assert str(Registry(str(root)).resolve("a@prod")) == "a@1"
    entry(root, 4).write_text(entry(root, 4).read_text() + " ")
    with pytest.raises(DamagedError, match=r"5\.json: does not follow 4\.json as it is"):
        Registry(str(root)).names()


def test_entries_say_who_and_why(root):
    history = Registry(str(root)).history("a")
    assert history[2]["reason"] == "the first"
    assert all("@" in entry["author"] for entry in history)


def lose_manifest(version: Path) -> None:
    (version / MANIFEST).unlink()


def lose_weights(version: Path) -> None:
    (version / "files/adapter_model.safetensors").unlink()


def change_a_bit(version: Path) -> None:
    (version / "files/adapter_model.safetensors").write_bytes(b"veights")


@pytest.mark.parametrize("damage", [lose_manifest, lose_weights, change_a_bit], ids=lambda damage: damage.__name__)
def test_no_alias_moves_to_a_damaged_version(root, damage):
    registry = Registry(str(root))
    damage(root / "adapters/a/versions/1")
    for move in (
        lambda: registry.promote("a@1", "prod"),
        lambda: registry.rollback("a", "prod"),
        lambda: registry.set_canary("a@1", "prod", 10, registry_limits()),
    ):
        with pytest.raises(DamagedError, match="a@1"):
            move()
    assert str(registry.resolve("a@prod")) == "a@2"
    assert verify_registry(str(root)).damaged == ["a@1"]
    if damage is not lose_manifest:
        assert str(registry.promote("a@1", "prod", force=True)) == "a@1"
        with pytest.raises(UserError, match=r"a@prod stands on it; .*--force"):
            registry.delete("a@1")
        registry.delete("a@1", force=True)
        with pytest.raises(NotFoundError, match="no such alias"):
            Registry(str(root)).resolve("a@prod")
    else:
        registry.delete("a@1")
    assert Registry(str(root)).versions("a") == [2]


def registry_limits():
    from ftray.registry import CanaryLimits

    return CanaryLimits()


def test_an_alias_does_not_change_its_base_by_mistake(root, adapter):
    registry = Registry(str(root))
    registry.publish("a", adapter, metadata={"base_fingerprint": "g", "base_model": "other"})
    with pytest.raises(
        UserError, match=r"a@3: was trained on other, and a@prod stands at version 2, whose base is tiny"
    ):
        registry.promote("a@3", "prod")
    registry.promote("a@3", "other")
    assert str(registry.promote("a@3", "prod", force=True)) == "a@3"


def test_names_that_are_no_versions_are_passed_over(root, adapter):
    for name in ("notes", "²", "copy of 2", "0", "01"):
        (root / "adapters/a/versions" / name).mkdir()
        (root / "adapters/a/versions" / name / "x").write_text("x")
    (root / "journal/notes.txt").write_text("x")
    (root / "journal/.5.json.tmp").write_text("x")
    assert str(Registry(str(root)).publish("a", adapter, metadata={})) == "a@3"
    assert not verify_registry(str(root)).problems


def run(*words: str):
    return CliRunner().invoke(app, list(words))


def test_on_the_command_line(root, adapter, tmp_path):
    filled_again = Registry(str(root))
    filled_again.publish("b", adapter, metadata={})
    lose_manifest(root / "adapters/a/versions/1")
    listed = run("adapters", "list", "--registry", str(root))
    assert listed.exit_code == 0
    assert "a@1    damaged: a@1: its manifest.json is gone" in listed.output
    assert "b@1" in listed.output
    seen = run("adapters", "verify", "--registry", str(root))
    assert isinstance(seen.exception, DamagedError)
    assert "a@1: its manifest.json is gone" in seen.output
    a_gap(root)
    assert isinstance(run("adapters", "list", "--registry", str(root)).exception, DamagedError)
    made = run("adapters", "verify", "--rebuild", "--registry", str(root))
    assert made.exit_code == 0, made.output
    assert "all whole" in made.output
    assert run("adapters", "list", "--registry", str(root)).output.count("@") >= 2
    missing = run("adapters", "verify", "--registry", str(tmp_path / "none"))
    assert isinstance(missing.exception, UserError)
    assert not (tmp_path / "none").exists()


def test_an_entry_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done = []
    real_sync, real_link, real_replace = atomic.os.fsync, atomic.os.link, atomic.os.replace
    monkeypatch.setattr(atomic.os, "fsync", lambda handle: (done.append("sync"), real_sync(handle)))
    monkeypatch.setattr(atomic.os, "link", lambda *places: (done.append("link"), real_link(*places)))
    monkeypatch.setattr(atomic.os, "replace", lambda *places: (done.append("replace"), real_replace(*places)))
    store = ObjectStore(str(tmp_path / "store"))
    store.create("journal/1.json", b"{}")
    assert done == ["sync", "link", "sync"]
    done.clear()
    (tmp_path / "file").write_bytes(b"x")
    store.write("a/b", tmp_path / "file")
    assert done == ["sync", "replace", "sync"]


def test_a_filesystem_without_hard_links_takes_entries_too(tmp_path, monkeypatch):
    def link(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(atomic.os, "link", link)
    store = ObjectStore(str(tmp_path / "store"))
    store.create("journal/1.json", b"{}")
    assert store.read("journal/1.json") == b"{}"
    with pytest.raises(Exception, match="exists already"):
        store.create("journal/1.json", b"other")
    assert store.read("journal/1.json") == b"{}"


def test_a_copy_in_the_cache_does_not_speak_for_a_store(tmp_path, adapter, monkeypatch):
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path / "cache"))
    with s3_server("bucket") as url:
        registry = filled(f"{url}/registry", adapter)
        assert registry.directory(registry.get("a@1")).is_dir()  # the copy is whole, and stays so
        assert not verify_registry(registry.location).problems
        ObjectStore(registry.location).write("adapters/a/versions/1/files/adapter_model.safetensors", b"veights")
        with pytest.raises(DamagedError, match=r"a@1: adapter_model\.safetensors in .* differs"):
            registry.promote("a@1", "prod")
        assert verify_registry(registry.location).damaged == ["a@1"]


def test_a_version_that_cannot_be_loaded_is_moved_to_by_nothing(root):
    def loads(directory: Path) -> None:
        raise AdapterError(f"{directory}: rank 0")

    registry = Registry(str(root))
    for move in (
        lambda: registry.promote("a@1", "prod", loads=loads),
        lambda: registry.rollback("a", "prod", loads=loads),
        lambda: registry.set_canary("a@1", "prod", 10, registry_limits(), loads=loads),
    ):
        with pytest.raises(AdapterError, match="rank 0"):
            move()
    assert str(registry.resolve("a@prod")) == "a@2"
    assert str(registry.promote("a@1", "prod", force=True, loads=loads)) == "a@1"


def test_one_bit_in_a_manifest_is_found(root):
    """It holds the base's fingerprint: the journal has its digest."""
    path = root / "adapters/a/versions/2" / MANIFEST
    path.write_text(path.read_text().replace('"base_fingerprint": "f"', '"base_fingerprint": "g"'))
    with pytest.raises(DamagedError, match=r"a@2: its manifest\.json .* is not the one that was published"):
        Registry(str(root)).get("a@prod")
    assert verify_registry(str(root)).damaged == ["a@2"]
    assert Registry(str(root)).get("a@1").metadata["base_fingerprint"] == "f"


def test_entries_of_before_manifests_had_a_digest_are_read(root):
    for path in (root / "journal").iterdir():  # a journal of then had no links either
        entry = json.loads(path.read_text())
        path.write_text(
            json.dumps({key: entry[key] for key in entry if key not in ("manifest", SEQ, REGISTRY, FOLLOWS)})
        )
    assert Registry(str(root)).get("a@prod").number == 2
