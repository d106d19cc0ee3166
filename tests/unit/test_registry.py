import threading
import time

import pytest
from s3 import s3_server

from ftray.errors import ConflictError, FtrayError, NotFoundError, UserError
from ftray.registry import CanaryLimits, Registry, parse_reference
from ftray.registry.card import model_card


@pytest.fixture
def adapter(tmp_path):
    directory = tmp_path / "adapter"
    directory.mkdir()
    (directory / "adapter_config.json").write_text("{}")
    (directory / "adapter_model.safetensors").write_bytes(b"weights")
    return directory


@pytest.fixture(scope="module")
def s3():
    with s3_server("bucket") as url:
        yield url


@pytest.fixture(params=["local", "s3"])
def location(request, tmp_path, monkeypatch):
    if request.param == "local":
        return str(tmp_path / "registry")
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path / "cache"))
    return f"{request.getfixturevalue('s3')}/{tmp_path.name}"


@pytest.fixture
def registry(location):
    return Registry(location)


def test_references():
    assert str(parse_reference("support")) == "support@prod"
    assert parse_reference("support@12").number == 12
    assert parse_reference("support@canary").alias == "canary"
    for bad in ("", "Support", "../x", "a@", "a@0", "a@Prod", "a@1b", "a/b", "a@b@c"):
        with pytest.raises(UserError):
            parse_reference(bad)


def test_versions_are_numbered_and_aliases_move(registry, adapter):
    first = registry.publish("support", adapter, metadata={"base_model": "m"})
    (adapter / "adapter_model.safetensors").write_bytes(b"better")
    second = registry.publish("support", adapter, metadata={"base_model": "m"})
    assert [str(first), str(second)] == ["support@1", "support@2"]
    registry.promote("support@1", "prod")
    registry.promote("support@2", "prod")
    assert str(registry.resolve("support")) == "support@2"
    assert (registry.directory(registry.get("support@1")) / "adapter_model.safetensors").read_bytes() == b"weights"
    moves = [(e["number"], e["previous"]) for e in registry.history("support") if e["type"] == "alias"]
    assert moves == [(1, None), (2, 1)]


def test_another_reader_follows_the_journal(registry, adapter):
    reader = Registry(registry.location)
    assert reader.names() == []
    registry.publish("a", adapter, metadata={})
    registry.promote("a@1", "prod")
    assert reader.aliases("a") == {"prod": 1}


def test_promote_is_a_compare_and_swap(registry, adapter):
    for _ in range(2):
        registry.publish("a", adapter, metadata={})
    registry.promote("a@1", "prod")
    with pytest.raises(ConflictError, match="stands at 1, expected 2"):
        registry.promote("a@2", "prod", expected=2)
    registry.promote("a@2", "prod", expected=1)


def at_once(*actions) -> list:
    """Their results, or errors, in no order."""
    found = []

    def run(action):
        try:
            found.append(action())
        except FtrayError as error:
            found.append(error)

    threads = [threading.Thread(target=run, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_racing_writers_get_different_numbers(location, adapter):
    published = at_once(*[lambda: Registry(location).publish("a", adapter, metadata={}).number] * 6)
    assert sorted(published) == [1, 2, 3, 4, 5, 6]
    assert Registry(location).versions("a") == [1, 2, 3, 4, 5, 6]


def test_of_two_writers_for_one_alias_one_wins_and_the_other_is_told(registry, location, adapter):
    for _ in range(3):
        registry.publish("a", adapter, metadata={})
    registry.promote("a@1", "prod")
    for _ in range(5):
        registry.promote("a@1", "prod")
        writers = [(lambda n=n: Registry(location).promote(f"a@{n}", "prod", expected=1)) for n in (2, 3)]
        lost = [result for result in at_once(*writers) if isinstance(result, FtrayError)]
        assert len(lost) == 1
        assert isinstance(lost[0], ConflictError)
        assert "expected 1" in str(lost[0])


def test_rollback_goes_back_through_what_was_promoted(registry, adapter):
    for _ in range(4):
        registry.publish("a", adapter, metadata={})
    for number in (1, 2, 4):
        registry.promote(f"a@{number}", "prod")
    assert [str(r) for r in registry.rollback("a", "prod")] == ["a@4", "a@2"]
    assert str(registry.resolve("a")) == "a@2"
    registry.promote("a@3", "prod")
    registry.delete("a@4")
    assert [str(registry.rollback("a", "prod")[1]) for _ in range(2)] == ["a@2", "a@1"]
    with pytest.raises(UserError, match="there is nothing to go back to"):
        registry.rollback("a", "prod")
    with pytest.raises(NotFoundError, match="no such alias"):
        registry.rollback("a", "beta")


def test_canaries_are_for_another_version_of_an_alias(registry, adapter):
    for _ in range(2):
        registry.publish("a", adapter, metadata={})
    with pytest.raises(NotFoundError, match="promote a version to it first"):
        registry.set_canary("a@2", "prod", 10, CanaryLimits())
    registry.promote("a@1", "prod")
    with pytest.raises(UserError, match="a canary is another version"):
        registry.set_canary("a@1", "prod", 10, CanaryLimits())
    with pytest.raises(UserError, match="not between 0 and 100"):
        registry.set_canary("a@2", "prod", 100, CanaryLimits())
    registry.set_canary("a@2", "prod", 10, CanaryLimits(max_error_rate=0.2))
    canary = Registry(registry.location).canaries("a")["prod"]
    assert (canary.number, canary.percent, canary.limits.max_error_rate) == (2, 10, 0.2)
    with pytest.raises(UserError, match="the canary of a@prod stand"):
        registry.delete("a@2")
    registry.end_canary("a", "prod", reason="enough")
    assert registry.canaries("a") == {}
    with pytest.raises(ConflictError):
        registry.end_canary("a", "prod", reason="again")


def test_delete_is_for_good_and_refused_while_an_alias_stands_there(registry, location, adapter):
    for _ in range(2):
        registry.publish("a", adapter, metadata={})
    registry.promote("a@1", "prod")
    with pytest.raises(UserError, match=r"a@1: a@prod stands on it"):
        registry.delete("a@1")
    registry.delete("a@2")
    for reader in (registry, Registry(location)):
        with pytest.raises(NotFoundError, match="a@2: deleted; a has 1"):
            reader.get("a@2")
    with pytest.raises(NotFoundError):
        registry.promote("a@2", "prod")
    assert str(registry.publish("a", adapter, metadata={})) == "a@3"  # the number is not used again


def test_of_promote_and_delete_at_once_one_is_told(registry, location, adapter):
    for number in range(2, 7):
        registry.publish("a", adapter, metadata={})
        if number == 2:
            registry.publish("a", adapter, metadata={})
        registry.promote("a@1", "prod")
        at_once(
            lambda n=number: Registry(location).promote(f"a@{n}", "prod"),
            lambda n=number: Registry(location).delete(f"a@{n}"),
        )
        standing = Registry(location).aliases("a")["prod"]
        assert standing in Registry(location).versions("a")


def test_tags(registry, adapter):
    registry.publish("a", adapter, metadata={})
    assert registry.tag("a@1", add=["reviewed", "lang=de"]) == ["lang=de", "reviewed"]
    assert registry.tag("a@1", remove=["reviewed"]) == ["lang=de"]
    with pytest.raises(UserError, match="a tag is"):
        registry.tag("a@1", add=["two words"])


def test_a_reader_that_is_tolerant_serves_what_it_knows(location, adapter, monkeypatch):
    Registry(location).publish("a", adapter, metadata={})
    Registry(location).promote("a@1", "prod")
    reader = Registry(location, tolerant=True)
    assert str(reader.resolve("a")) == "a@1"

    def broken(self, key):
        raise FtrayError("the store does not answer")

    monkeypatch.setattr("ftray.storage.ObjectStore.read", broken)
    monkeypatch.setattr("ftray.registry.reader.NEWS_S", 0)
    reader._max_age_s = 0
    assert str(reader.resolve("a")) == "a@1"
    with pytest.raises(FtrayError):
        Registry(location).resolve("a")


def test_news_of_a_remote_store_is_heard_in_time(s3, adapter, tmp_path):
    location = f"{s3}/{tmp_path.name}"
    writer = Registry(location)
    for _ in range(2):
        writer.publish("a", adapter, metadata={})
    writer.promote("a@1", "prod")
    reader = Registry(location, tolerant=True)
    assert str(reader.resolve("a")) == "a@1"
    writer.promote("a@2", "prod")
    writer.publish("a", adapter, metadata={})
    assert str(reader.resolve("a@3")) == "a@3"  # what it does not know it looks for at once
    end = time.monotonic() + 2
    while str(reader.resolve("a")) != "a@2":
        assert time.monotonic() < end


def test_a_model_card(registry, adapter):
    metadata = {
        "base_model": "m",
        "rank": 8,
        "lineage": {"run": "r", "data_digest": "abc"},
        "metrics": {"final_loss": 0.5},
    }
    registry.publish("a", adapter, metadata=metadata)
    registry.promote("a@1", "prod")
    registry.tag("a@1", add=["reviewed"])
    card = model_card(registry, registry.get("a@1"))
    for reported in (
        "# a@1",
        "| rank | 8 |",
        "| run | r |",
        "| final_loss | 0.5 |",
        "| aliases | prod |",
        "reviewed",
        "adapter_config.json",
    ):
        assert reported in card


def test_a_crash_while_publishing_burns_the_number(registry, adapter):
    registry._claim("a")  # a writer that died after its claim
    assert registry.versions("a") == []
    assert str(registry.publish("a", adapter, metadata={})) == "a@2"
    with pytest.raises(NotFoundError, match="a@1: no such version; a has 2"):
        registry.get("a@1")


def test_what_is_not_there_is_named_with_what_is(registry, adapter):
    with pytest.raises(NotFoundError, match="it is empty"):
        registry.get("support")
    registry.publish("support", adapter, metadata={})
    with pytest.raises(NotFoundError, match="did you mean support"):
        registry.get("suport")
    with pytest.raises(NotFoundError, match=r"ftray adapters promote support@1 prod"):
        registry.get("support@prod")


def test_a_tampered_file_is_refused_and_a_tampered_copy_fetched_again(registry, location, adapter):
    version = registry.publish("a", adapter, metadata={})
    file = registry.directory(version) / "adapter_model.safetensors"
    file.write_bytes(b"tampered")
    if "://" in location:
        assert registry.directory(version) == file.parent
        assert file.read_bytes() == b"weights"
        return
    with pytest.raises(FtrayError, match="differ from their manifest"):
        registry.directory(version)


def test_processes_that_fetch_a_copy_at_once_all_get_it_whole(s3, tmp_path, adapter, monkeypatch):
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path / "cache"))
    location = f"{s3}/{tmp_path.name}"
    version = Registry(location).publish("a", adapter, metadata={})
    found = at_once(*[lambda: (Registry(location).directory(version) / "adapter_config.json").read_text()] * 6)
    assert found == ["{}"] * 6
