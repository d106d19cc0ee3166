"""What the tests of the endpoint's HTTP side share."""

import pytest
from fake_endpoint import EchoBackend

from ftray.registry import Registry


@pytest.fixture
def backend():
    return EchoBackend()


@pytest.fixture
def registry(tmp_path):
    directory = tmp_path / "adapter"
    directory.mkdir()
    (directory / "adapter_config.json").write_text("{}")
    registry = Registry(str(tmp_path / "registry"))
    for _ in range(3):
        registry.publish("support", directory, metadata={})
    registry.promote("support@2", "prod")
    registry.promote("support@3", "canary")
    return registry
