"""Reading rows: a file (also `s3://...`), a saved directory, or a hub id, all through Hugging Face `datasets`."""

import difflib
import glob
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from ftray.errors import DataError, FtrayError
from ftray.storage import local_copies
from ftray.storage.cache import cache_directory
from ftray.storage.manifest import MANIFEST

FILE_READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def check_source(key: str, source: str) -> None:
    """What costs nothing to know before any work: the file is there and of a known kind."""
    path = Path(source)
    if path.is_dir() or ((path.is_file() or "://" in source) and path.suffix in FILE_READERS):
        return
    if path.is_file() or "://" in source:
        raise DataError(f"{key}: {source}: unknown kind of file; use {', '.join(FILE_READERS)}")
    if path.exists():
        raise DataError(f"{key}: {source}: is no file but a pipe or device; write the rows to a file first")
    if path.suffix in FILE_READERS or source.count("/") != 1 or source.startswith("."):
        names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, names, n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else f" (looked from {Path.cwd()})"
        raise DataError(f"{key}: {source}: no such file{hint}")


def load_rows(key: str, source: str, *, revision: str | None = None) -> Any:
    """A `datasets.Dataset`. Raises `DataError` naming the source when it cannot be read or is empty."""
    check_source(key, source)
    import datasets
    from datasets.config import HF_DATASETS_CACHE
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    datasets.disable_progress_bars()
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # what it logs of a file is said in the error
    path = local_file(key, source)
    try:
        if path.is_dir():
            rows = datasets.load_from_disk(str(path))
        elif path.is_file():
            if path.stat().st_size == 0:
                raise DataError(f"{key}: {source}: the file is empty")
            rows = datasets.load_dataset(FILE_READERS[path.suffix], data_files=glob.escape(str(path)), split="train")
        else:
            rows = datasets.load_dataset(source, revision=revision, split="train")
    except (DatasetGenerationError, DatasetNotFoundError) as error:
        where = first_bad_json(path) if path.suffix in (".jsonl", ".json") else None
        raise DataError(f"{key}: {source}: {where or f'cannot be read: {root_cause(error)}'}") from None
    except (OSError, ValueError) as error:
        if "corresponds to no data" in str(error):  # what `datasets` says of a file with a header and no rows
            raise DataError(f"{key}: {source}: has no rows") from None
        place = str(error.filename or "") if isinstance(error, OSError) else ""
        if place.startswith(str(HF_DATASETS_CACHE)):
            raise DataError(
                f"HF_HOME: {HF_DATASETS_CACHE} cannot be written ({root_cause(error)}), where `datasets` "
                f"keeps what it reads of {key}; set HF_HOME (or HF_DATASETS_CACHE) to a directory that can"
            ) from None
        raise DataError(f"{key}: {source}: cannot be read: {root_cause(error)}") from None
    if isinstance(rows, datasets.DatasetDict):
        raise DataError(
            f"{key}: {source}: holds the splits {', '.join(map(str, rows))}; save the one to use as its own directory"
        )
    if len(rows) == 0:
        raise DataError(f"{key}: {source}: has no rows")
    return rows


def local_file(key: str, source: str) -> Path:
    """Of an object in a store, this machine's copy. Raises `DataError` where it cannot be had."""
    if "://" not in source:
        return Path(source)
    try:
        directory = local_copies(cache_directory()).fetch(source)
    except FtrayError as error:
        raise DataError(f"{key}: {error}") from None
    paths = [path for path in directory.iterdir() if path.name != MANIFEST]
    if len(paths) != 1 or not paths[0].is_file():
        raise DataError(f"{key}: {source}: is no single file; give one of {', '.join(FILE_READERS)}")
    return paths[0]


def source_digest(source: str, rows: Any) -> str:
    """Of its content: the bytes of a file; for a directory or hub id, the fingerprint that `datasets` keeps."""
    path = local_file("data", source)
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return rows._fingerprint


def first_bad_json(path: Path) -> str | None:
    """Which line is no JSON, and why; pyarrow counts from another end. None: each is."""
    with path.open("rb") as file:
        is_array = file.read(64).lstrip().startswith(b"[")
        file.seek(0)
        for first, text in [(1, file.read())] if is_array else enumerate(file, 1):
            try:
                json.loads(text.decode("utf-8-sig")) if text.strip() else None
            except json.JSONDecodeError as error:
                return f"line {first + error.lineno - 1}, column {error.colno}: is no JSON ({error.msg})"
            except UnicodeDecodeError as error:
                number = first + text.count(b"\n", 0, error.start)
                return f"line {number}: is no UTF-8 ({error.reason})"
    return None


def root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
