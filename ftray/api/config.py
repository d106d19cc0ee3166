"""What a caller gives as a config, and as data, as the commands read them."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ftray.config import load_config, parse_config, to_yaml
from ftray.errors import UserError
from ftray.storage import write_bytes
from ftray.train.runs.uri import is_stored

ROWS = ".rows"  # of a runs_dir: data that were given as Python objects


def read_config(config: Any, overrides: Sequence[str], *, kind: str) -> Any:
    """A path, a mapping of keys as in the file, or the config object itself; with overrides `key.path=value`.

    Raises `ConfigError` with every problem that it has.
    """
    if isinstance(config, str | Path):
        return load_config(config, overrides, kind=kind)
    tree = config if isinstance(config, dict) else config.model_dump(mode="json")
    tree = json.loads(json.dumps({"kind": kind, **tree}, default=plain))
    return parse_config(to_yaml(tree), overrides, kind=kind, source="config")


def rows_file(rows: Any, *, runs_dir: str, key: str) -> str:
    """Data as a config names them: a path as it is; rows (dicts, a `datasets.Dataset`, a DataFrame) as a JSONL file of
    the runs' directory, named by its content, so that the same rows resume the same run."""
    if isinstance(rows, str | Path):
        return str(rows)
    if is_stored(runs_dir):
        raise UserError(
            f"{key}: rows given from Python need a runs_dir on a disk; write them to a file and give its path"
        )
    if hasattr(rows, "to_dict") and hasattr(rows, "columns"):  # a DataFrame
        rows = rows.to_dict(orient="records")
    content = "".join(
        json.dumps(row, ensure_ascii=False, default=plain) + "\n" for row in checked(rows, key=key)
    ).encode()
    path = Path(runs_dir).absolute() / ROWS / f"{hashlib.sha256(content).hexdigest()[:16]}.jsonl"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, content)
    return str(path)


def plain(value: Any) -> Any:
    """Paths, arrays and numbers of numpy as JSON has them."""
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise UserError(f"{value!r}: is of type {type(value).__name__}, which a config or JSONL file cannot hold")


def checked(rows: Iterable[Any], *, key: str) -> Iterable[dict[str, Any]]:
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UserError(
                f"{key}: row {number} is of type {type(row).__name__}; give dicts, as a JSONL file has them"
            )
        yield row
