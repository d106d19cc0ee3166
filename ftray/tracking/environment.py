"""environment.json: what a run's numbers depend on besides its config."""

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ftray.storage.machine import usable_cores

PACKAGES = ("ftray", "ray", "torch", "transformers", "peft", "deepspeed", "datasets", "wandb", "numpy", "safetensors")


def describe_environment() -> dict[str, Any]:
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpus": usable_cores(),
        "packages": {name: installed_version(name) for name in PACKAGES},
    }


def installed_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
