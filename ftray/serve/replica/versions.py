"""A version of the registry as an endpoint hosts it: of its base, not too large, its files on this machine."""

from pathlib import Path

from ftray.config.serve import AdaptersConfig, EngineConfig
from ftray.errors import AdapterError
from ftray.model.adapters.directory import WEIGHTS_FILE, check_base
from ftray.model.adapters.weights import check_rank, read_adapter
from ftray.model.base import BaseModel
from ftray.registry import Registry

LEAST_SLOT_RANK = 16


def hosted_directory(key: str, registry: Registry, base: BaseModel, limits: AdaptersConfig) -> Path:
    """Where its files are, fetched if they were not. Raises `AdapterError` before it fetches what cannot be hosted."""
    version = registry.get(key)
    check_base(str(version), version.metadata, base)
    size = sum(entry.size for entry in version.manifest.files if entry.path == WEIGHTS_FILE)
    check_size(size, limits, label=str(version))
    return registry.directory(version)


def check_size(num_bytes: int, limits: AdaptersConfig, *, label: str) -> None:
    """Of the numbers as they are saved: a budget that could not hold them even if bfloat16 did is too small."""
    for name, budget in (("host_budget", limits.host_budget), ("device_budget", limits.device_budget)):
        if num_bytes > 2 * budget:
            raise AdapterError(
                f"{label}: {WEIGHTS_FILE} has {num_bytes:,} bytes, too many for this endpoint's "
                f"adapters.{name} ({budget:,}); raise it or publish a smaller rank"
            )


def with_rank(limits: AdaptersConfig, engine: EngineConfig, registry: Registry) -> AdaptersConfig:
    """For vLLM, whose slots have one size: that of the newest versions and those that aliases name."""
    if limits.max_rank is not None or engine.type != "vllm":
        return limits
    wanted = {
        f"{name}@{number}"
        for name in registry.names()
        for number in (*registry.versions(name)[-1:], *registry.aliases(name).values())
    }
    ranks = [registry.get(reference).metadata.get("rank") or 0 for reference in wanted]
    return limits.model_copy(update={"max_rank": max([LEAST_SLOT_RANK, *ranks])})


def check_preloaded(limits: AdaptersConfig, registry: Registry, base: BaseModel) -> None:
    """Refuses in `adapters.preload` what is missing, damaged, of another base, or too large: replicas start without it,
    and say so only in their logs."""
    for reference in limits.preload:
        key = str(registry.resolve(reference))
        check_rank(read_adapter(hosted_directory(key, registry, base, limits), label=key), limits.rank_limit, label=key)
