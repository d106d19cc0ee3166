"""The engine that a config names, and what can be done with any engine in one thread."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftray.config.engines import engine_kind
from ftray.config.serve import AdaptersConfig, EngineConfig
from ftray.errors import UserError
from ftray.infer.protocol import Engine, Request
from ftray.infer.thoughts import split, thought_stream
from ftray.model.base import BaseModel, context_limit
from ftray.model.chat.template import ThoughtFrame
from ftray.model.families import check_layers
from ftray.model.proof import refuse, remembered
from ftray.model.weight_precision import check_precision
from ftray.plugins import load_plugin

if TYPE_CHECKING:  # importing them loads torch and the model code
    from ftray.infer.torch_engine.engine import TorchEngine
    from ftray.model.hardware import Hardware

LOCAL_KV_CACHE_TOKENS = 16384
SERVED = "torch_engine"  # of a proof


def check_engine(config: EngineConfig) -> None:
    """The part of `make_engine` that costs nothing. Raises `UserError`."""
    if not has_engine(config):
        package = engine_kind(config.type).package
        raise UserError(f"engine.type: {package} is not installed; pip install 'ftray[{package}]', or use type: torch")


def has_engine(config: EngineConfig) -> bool:
    package = engine_kind(config.type).package
    return package is None or importlib.util.find_spec(package) is not None


def check_served(base: BaseModel) -> None:
    """Raises `UserError` where the torch engine is not shown to compute its architecture right: at its first use in a
    second or two, after that without torch."""

    def find() -> str | None:
        from ftray.infer.torch_engine.proof import served_problem

        return served_problem(base)

    check_layers(base)
    check_precision(base)
    refuse(base, remembered(SERVED, base, find), what="serving")


def make_engine(base: BaseModel, hardware: "Hardware", config: EngineConfig, adapters: AdaptersConfig) -> Engine:
    check_engine(config)
    if config.type == "torch":
        check_served(base)
    made = load_plugin(engine_kind(config.type).path, type, key="engine.type")
    return made(base, hardware, config, adapters)


def make_local_engine(base: BaseModel, hardware: "Hardware", *, context_tokens: int) -> "TorchEngine":
    """For one thread's own questions, with the context that is asked for as far as the model has it."""
    from ftray.infer.torch_engine.engine import TorchEngine

    check_served(base)
    context = min(context_tokens, context_limit(base) or context_tokens)
    settings = EngineConfig(context_tokens=context, kv_cache_tokens=max(LOCAL_KV_CACHE_TOKENS, context))
    return TorchEngine(base, hardware, settings, AdaptersConfig())


def load_adapter(engine: Any, key: str, directory: Path) -> None:
    """Reads, checks and loads in this thread."""
    loading = engine.load_adapter(engine.prepare_adapter(key, directory))
    if loading is not None:
        loading.result()


def generate(engine: Any, requests: list[Request], *, frame: ThoughtFrame | None = None) -> dict[str, str]:
    """Runs requests to their end, in this thread; returns {request id: text} (of the first answer). `frame`: of the
    thoughts that are no part of it."""
    streams = {request.id: thought_stream(frame, engine.tokenizer, request.prompt_ids) for request in requests}
    for request in requests:
        engine.add(request)
    texts = {request.id: "" for request in requests}
    while engine.has_work:
        for event in engine.step():
            if event.index == 0:
                stream = streams[event.request_id]
                texts[event.request_id] += event.text if stream is None else split(event, stream, engine.stop_ids)[1]
    return texts
