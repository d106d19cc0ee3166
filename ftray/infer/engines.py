"""The engine that a config names, and what can be done with any engine in one thread."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftray.config.engines import engine_kind
from ftray.config.serve import AdaptersConfig, EngineConfig
from ftray.errors import UserError
from ftray.infer.protocol import Engine, Request
from ftray.model.base import BaseModel, context_limit
from ftray.plugins import load_plugin

if TYPE_CHECKING:  # importing them loads torch and the model code
    from ftray.infer.torch_engine.engine import TorchEngine
    from ftray.model.hardware import Hardware

LOCAL_KV_CACHE_TOKENS = 16384


def check_engine(config: EngineConfig) -> None:
    """The part of `make_engine` that costs nothing. Raises `UserError`."""
    if not has_engine(config):
        package = engine_kind(config.type).package
        raise UserError(f"engine.type: {package} is not installed; pip install 'ftray[{package}]', or use type: torch")


def has_engine(config: EngineConfig) -> bool:
    package = engine_kind(config.type).package
    return package is None or importlib.util.find_spec(package) is not None


def make_engine(base: BaseModel, hardware: "Hardware", config: EngineConfig, adapters: AdaptersConfig) -> Engine:
    check_engine(config)
    made = load_plugin(engine_kind(config.type).path, type, key="engine.type")
    return made(base, hardware, config, adapters)


def make_local_engine(base: BaseModel, hardware: "Hardware", *, context_tokens: int) -> "TorchEngine":
    """For one thread's own questions, with the context that is asked for as far as the model has it."""
    from ftray.infer.torch_engine.engine import TorchEngine

    context = min(context_tokens, context_limit(base) or context_tokens)
    settings = EngineConfig(context_tokens=context, kv_cache_tokens=max(LOCAL_KV_CACHE_TOKENS, context))
    return TorchEngine(base, hardware, settings, AdaptersConfig())


def load_adapter(engine: Any, key: str, directory: Path) -> None:
    """Reads, checks and loads in this thread."""
    loading = engine.load_adapter(engine.prepare_adapter(key, directory))
    if loading is not None:
        loading.result()


def generate(engine: Any, requests: list[Request]) -> dict[str, str]:
    """Runs requests to their end, in this thread; returns {request id: text} (of the first answer)."""
    for request in requests:
        engine.add(request)
    texts = {request.id: "" for request in requests}
    while engine.has_work:
        for event in engine.step():
            if event.index == 0:
                texts[event.request_id] += event.text
    return texts


def generate_tokens(engine: Any, requests: list[Request]) -> dict[str, list[int]]:
    """As `generate`: {request id: token ids} (of the first answer)."""
    for request in requests:
        engine.add(request)
    ids: dict[str, list[int]] = {request.id: [] for request in requests}
    while engine.has_work:
        for event in engine.step():
            if event.index == 0:
                ids[event.request_id].append(event.token_id)
    return ids
