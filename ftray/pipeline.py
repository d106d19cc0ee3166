"""Stages that join the parts: from a run's adapter directory to a published version."""

from pathlib import Path
from typing import Any

from ftray.errors import UserError
from ftray.model.adapter import read_adapter, read_adapter_config
from ftray.registry import AdapterVersion, Registry
from ftray.storage import read_json, verify_directory
from ftray.storage.manifest import MANIFEST, build_manifest


def publish_adapter(registry: Registry, name: str, directory: Path) -> AdapterVersion:
    """Checks that the directory is whole and can be served, then copies it in as the next version of `name`."""
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; give a PEFT adapter directory, such as runs/NAME/adapter")
    metadata: dict[str, Any] = {}
    if (directory / MANIFEST).is_file():
        metadata = dict(verify_directory(directory).metadata)
    config = read_adapter_config(directory, label=str(directory))
    adapter = read_adapter(directory, label=str(directory))
    metadata.setdefault("base_model", config.get("base_model_name_or_path"))
    metadata |= {"rank": adapter.max_rank, "num_bytes": adapter.num_bytes}
    result = directory.parent / "result.json"
    if result.is_file():
        finished = read_json(result)
        metadata["metrics"] = {key: finished[key] for key in ("steps", "final_loss", "final_eval_loss")}
    return registry.publish(name, directory, metadata=metadata)


def publish_once(registry: Registry, name: str, directory: Path, *, alias: str) -> AdapterVersion:
    """The newest version, when it holds exactly these files; else the next one. The alias points at it afterwards."""
    numbers = registry.versions(name)
    version = registry.get(f"{name}@{numbers[-1]}") if numbers else None
    if version is None or version.manifest.files != build_manifest(directory, metadata={}).files:
        version = publish_adapter(registry, name, directory)
    if registry.aliases(name).get(alias) != version.number:
        registry.promote(str(version), alias)
    return version
