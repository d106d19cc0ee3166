"""From a run's adapter directory to a published version."""

import hashlib
import json
from pathlib import Path
from typing import Any

from ftray.errors import UserError
from ftray.model.adapters.directory import read_adapter_config
from ftray.model.base import kept_chat
from ftray.registry import AdapterVersion, Registry
from ftray.storage import read_json, verify_directory
from ftray.storage.manifest import MANIFEST, build_manifest


def publish_adapter(
    registry: Registry, name: str, directory: Path, *, lineage: dict[str, Any] | None = None
) -> AdapterVersion:
    """Checks that the directory is whole and can be served, then copies it in as the next version of `name`.
    `lineage`: where it comes from, beyond its run."""
    from ftray.model.adapters.weights import read_adapter  # torch, which a driver does without until it publishes

    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; give a PEFT adapter directory, such as runs/NAME/adapter")
    metadata: dict[str, Any] = {}
    if (directory / MANIFEST).is_file():
        metadata = dict(verify_directory(directory).metadata)
    config = read_adapter_config(directory, label=str(directory))
    adapter = read_adapter(directory, label=str(directory))
    metadata.setdefault("base_model", config.get("base_model_name_or_path"))
    if "chat" not in metadata and (kept := kept_chat(directory)) is not None:
        metadata["chat"] = kept.model_dump()
    metadata |= {"rank": adapter.max_rank, "num_bytes": adapter.num_bytes}
    metadata |= of_the_run(directory.parent)
    if lineage is not None:
        metadata["lineage"] = metadata.get("lineage", {}) | lineage
    return registry.publish(name, directory, metadata=metadata)


def of_the_run(path: Path) -> dict[str, Any]:
    """Lineage and metrics, where the adapter lies in the directory of a finished run."""
    if not (path / "result.json").is_file():
        return {}
    finished, config = read_json(path / "result.json"), read_json(path / "config.json")
    environment = read_json(path / "environment.json")
    lineage = {
        "run": finished["name"],
        "objective": config["objective"]["type"],
        "data": config["data"]["train"],
        "data_digest": finished.get("data_digest"),
        "config_digest": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
        "ftray": environment.get("packages", {}).get("ftray"),
    }
    metrics = {key: finished[key] for key in ("steps", "final_loss", "final_eval_loss", "tokens_per_s")}
    return {"lineage": lineage, "metrics": metrics}


def publish_if_new(
    registry: Registry, name: str, directory: Path, *, lineage: dict[str, Any] | None = None
) -> AdapterVersion:
    """The newest version, when it holds exactly these files; else the next one."""
    numbers = registry.versions(name)
    version = registry.get(f"{name}@{numbers[-1]}") if numbers else None
    if version is None or version.manifest.files != build_manifest(directory, metadata={}).files:
        version = publish_adapter(registry, name, directory, lineage=lineage)
    return version


def publish_once(
    registry: Registry, name: str, directory: Path, *, alias: str, lineage: dict[str, Any] | None = None
) -> AdapterVersion:
    """As `publish_if_new`; the alias points at it afterwards."""
    version = publish_if_new(registry, name, directory, lineage=lineage)
    if registry.aliases(name).get(alias) != version.number:
        registry.promote(str(version), alias)
    return version
