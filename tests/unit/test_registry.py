import threading

import pytest

from ftray.errors import ConflictError, FtrayError, NotFoundError, UserError
from ftray.registry import Registry, parse_reference


@pytest.fixture
def adapter(tmp_path):
    directory = tmp_path / "adapter"
    directory.mkdir()
    (directory / "adapter_config.json").write_text("{}")
    (directory / "adapter_model.safetensors").write_bytes(b"weights")
    return directory


@pytest.fixture
def registry(tmp_path):
    return Registry(str(tmp_path / "registry"))


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


def test_racing_writers_get_different_numbers(tmp_path, adapter):
    published = []

    def publish():
        published.append(Registry(str(tmp_path / "r")).publish("a", adapter, metadata={}).number)

    threads = [threading.Thread(target=publish) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(published) == [1, 2, 3, 4, 5, 6]
    assert Registry(str(tmp_path / "r")).versions("a") == [1, 2, 3, 4, 5, 6]


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


def test_a_tampered_file_is_refused(registry, adapter):
    version = registry.publish("a", adapter, metadata={})
    (registry.directory(version) / "adapter_model.safetensors").write_bytes(b"tampered")
    with pytest.raises(FtrayError, match="differ from their manifest"):
        registry.directory(version)
