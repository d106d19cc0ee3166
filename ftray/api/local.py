"""An engine in this process, with one adapter of a registry or directory."""

import difflib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ftray.config.chat import ChatConfig
from ftray.errors import UserError
from ftray.infer.engines import load_adapter, make_local_engine
from ftray.infer.torch_engine.engine import TorchEngine
from ftray.model.adapters.directory import check_base, local_adapter
from ftray.model.base import EMBEDDED, BaseModel, chat_in, is_hub_id, kept_chat, prepare_base
from ftray.model.hardware import choose_hardware
from ftray.registry import Registry
from ftray.storage import read_json, read_manifest
from ftray.storage.manifest import MANIFEST


def load_engine(
    base_model: str,
    adapter: str | None,
    registry: str,
    *,
    chat: ChatConfig | None = None,
    context_tokens: int = 2048,
) -> tuple[TorchEngine, str | None]:
    """The engine and the key of its adapter (None without one). The adapter is checked before the base is loaded.
    `chat`: how conversations are rendered; None: as the adapter or the base was trained."""
    base = prepare_base(base_model, chat=chat, log=print)
    found = resolve_adapter(adapter, registry, base) if adapter is not None else None
    if chat is None and found is not None:
        base = replace(base, chat=found.chat or base.chat)
    engine = make_local_engine(base, choose_hardware(), context_tokens=context_tokens)
    if found is None:
        return engine, None
    load_adapter(engine, found.key, found.directory)
    return engine, found.key


@dataclass(frozen=True)
class FoundAdapter:
    key: str
    directory: Path
    chat: ChatConfig | None  # that it was trained with; None: it does not say


def resolve_adapter(adapter: str, registry: str, base: BaseModel) -> FoundAdapter:
    """NAME@VERSION, NAME@ALIAS or a PEFT directory. Raises `UserError` for one of another base."""
    if (directory := local_adapter(adapter)) is not None:
        check_base(adapter, metadata_of(directory), base)
        return FoundAdapter(adapter, directory, kept_chat(directory))
    store = Registry(registry)
    version = store.get(adapter)
    check_base(str(version), version.metadata, base)
    return FoundAdapter(str(version), store.directory(version), chat_in(version.metadata))


def base_of(model: str, registry: str, *, base_model: str | None = None) -> tuple[str, str | None]:
    """(base, adapter) of what a user names: a base by itself, or an adapter over its base."""
    is_file = model.endswith(".gguf") or (Path(model) / "config.json").is_file()
    if model in EMBEDDED or is_file:
        return model, None
    directory = local_adapter(model)
    if directory is None and is_hub_id(model):
        return model, None
    if directory is None:
        if near := difflib.get_close_matches(model.lower(), EMBEDDED, n=1, cutoff=0.8):
            raise UserError(f"{model}: no such model; did you mean {near[0]}?")
        return base_model or Registry(registry).get(model).metadata["base_model"], model
    known = base_model or metadata_of(directory).get("base_model")
    if known is None and (directory / "adapter_config.json").is_file():
        known = read_json(directory / "adapter_config.json").get("base_model_name_or_path")
    if known is None:
        raise UserError(f"{model}: does not say which base it is for; give base_model")
    return known, model


def metadata_of(directory: Path) -> dict[str, Any]:
    return read_manifest(directory).metadata if (directory / MANIFEST).is_file() else {}
