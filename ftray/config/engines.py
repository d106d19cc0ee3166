"""Which engines there are: what each can do, and where its class is. Nothing here loads one."""

from dataclasses import dataclass

from ftray.plugins import is_plugin, load_plugin


@dataclass(frozen=True)
class EngineKind:
    """A user's own: `engine.type: "module:NAME"`, where NAME is one of these."""

    path: str  # module:CLASS of an infer/protocol.py `Engine`, made of (base, hardware, EngineConfig, AdaptersConfig)
    package: str | None = None  # that must be installed, as ftray's extra of this name does it
    splits_base: bool = False  # over `engine.tensor_parallel` GPUs
    gpus_per_worker: float = 1.0  # then: of each worker in Ray's books; the replica has the rest of the first
    keeps_adapter_dtype: bool = True  # `adapters.dtype` may be another than the base's


ENGINES = {
    "torch": EngineKind("ftray.infer.torch_engine.engine:TorchEngine"),
    "vllm": EngineKind(
        "ftray.infer.vllm_engine.engine:VllmEngine",
        package="vllm",
        splits_base=True,
        gpus_per_worker=0.9,
        keeps_adapter_dtype=False,
    ),
}


def engine_kind(name: str) -> EngineKind:
    """Of `engine.type`. Raises `UserError` for a plug-in that is none."""
    return load_plugin(name, EngineKind, key="engine.type") if is_plugin(name) else ENGINES[name]


def who_can(capability: str) -> str:
    """Names of the engines that have it, for messages."""
    return " or ".join(name for name, kind in ENGINES.items() if getattr(kind, capability))
