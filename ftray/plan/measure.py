"""The size of a model, counted once for each shape (`counting.py`, with torch) and then kept."""

import hashlib
import json
import pickle
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ftray.config.adapter import AdapterConfig
from ftray.model.families import check_config
from ftray.plan.model_size import ModelSize
from ftray.storage.atomic import write_bytes
from ftray.storage.cache import cache_directory

KEPT = "model-sizes"  # in the cache directory
COUNTED_BY = ("torch", "transformers", "peft")  # another version may count otherwise
PACKAGE = Path(__file__).parents[1]
CODE = ("model", "plan")  # rooms of ftray whose change may change a count


def measure_model(config: dict[str, Any], adapter: AdapterConfig | None, *, dtype: str) -> ModelSize:
    """`config`: what `read_model_config` returned. Weights and activations are taken to be of `dtype`, a name of
    torch's. Raises `UserError` for a model that ftray does not compute or that cannot be counted."""
    check_config(config, name=str(config.get("model_type")))
    kept = cache_directory() / KEPT / f"{digest_of(config, adapter, dtype)}.pickle"
    if kept.is_file():
        return pickle.loads(kept.read_bytes())
    from ftray.plan.counting import count_model

    size = count_model(config, adapter, dtype=dtype)
    write_bytes(kept, pickle.dumps(size))
    return size


def digest_of(config: dict[str, Any], adapter: AdapterConfig | None, dtype: str) -> str:
    """Of all that the numbers depend on."""
    depends = {
        "config": config,
        "adapter": adapter.model_dump(mode="json") if adapter is not None else None,
        "dtype": dtype,
        "counted_by": [version(name) for name in COUNTED_BY],
        "code": [path.read_text() for room in CODE for path in sorted((PACKAGE / room).rglob("*.py"))],
    }
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:32]
