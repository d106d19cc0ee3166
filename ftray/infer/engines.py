"""The engine that a config names."""

import importlib.util

from ftray.config.serve import AdaptersConfig, EngineConfig
from ftray.errors import UserError
from ftray.infer.protocol import Engine
from ftray.model.base import BaseModel
from ftray.model.hardware import Hardware


def check_engine(config: EngineConfig) -> None:
    """The part of `make_engine` that costs nothing."""
    if config.type == "vllm" and importlib.util.find_spec("vllm") is None:
        raise UserError("engine.type: vllm is not installed; pip install 'ftray[vllm]', or use type: torch")


def make_engine(base: BaseModel, hardware: Hardware, config: EngineConfig, adapters: AdaptersConfig) -> Engine:
    check_engine(config)
    if config.type == "vllm":
        from ftray.infer.vllm_engine import VllmEngine

        return VllmEngine(base, hardware, config, adapters)
    from ftray.infer.torch_engine import TorchEngine

    return TorchEngine(base, hardware, config, adapters)
