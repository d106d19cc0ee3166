"""An engine in this process, with one adapter of a registry or directory, for `eval` and `chat`."""

from ftray.infer.engines import load_adapter, make_local_engine
from ftray.infer.torch_engine.engine import TorchEngine
from ftray.model.adapter import check_base, local_adapter
from ftray.model.base import prepare_base
from ftray.model.hardware import choose_hardware
from ftray.registry import Registry
from ftray.storage import read_manifest
from ftray.storage.manifest import MANIFEST


def load_engine(
    base_model: str, adapter: str | None, registry: str, *, context_tokens: int = 2048
) -> tuple[TorchEngine, str | None]:
    """The engine and the key of its adapter (None without one). The adapter is checked before the base is loaded."""
    base = prepare_base(base_model, log=print)
    key, directory = None, None
    if adapter is not None:
        key, directory = adapter, local_adapter(adapter)
        if directory is not None:
            metadata = read_manifest(directory).metadata if (directory / MANIFEST).is_file() else {}
        else:
            store = Registry(registry)
            version = store.get(adapter)
            key, directory, metadata = str(version), store.directory(version), version.metadata
        check_base(key, metadata, base)
    engine = make_local_engine(base, choose_hardware(), context_tokens=context_tokens)
    if key is not None and directory is not None:
        load_adapter(engine, key, directory)
    return engine, key
