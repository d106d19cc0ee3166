"""A version of the registry as an endpoint hosts it: of its base, not too large, its files on this machine."""

from pathlib import Path

from ftray.config.serve import AdaptersConfig
from ftray.model.adapter import check_base, check_file_size, check_rank, read_adapter
from ftray.model.base import BaseModel
from ftray.registry import Registry


def hosted_directory(key: str, registry: Registry, base: BaseModel, limits: AdaptersConfig) -> Path:
    """Where its files are, fetched if they were not. Raises `AdapterError` before it fetches what cannot be hosted."""
    version = registry.get(key)
    check_base(str(version), version.metadata, base)
    directory = registry.directory(version)
    check_file_size(directory, limits.host_budget, label=str(version))
    return directory


def check_preloaded(limits: AdaptersConfig, registry: Registry, base: BaseModel) -> None:
    """Of `adapters.preload`, what replicas would refuse: they start without it, and say so only in their logs."""
    for reference in limits.preload:
        key = str(registry.resolve(reference))
        check_rank(read_adapter(hosted_directory(key, registry, base, limits), label=key), limits.max_rank, label=key)
