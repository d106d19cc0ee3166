"""Reading rows: a file (also `s3://...`), a glob, a directory of files or a saved one, or a hub id."""

import difflib
import glob
import gzip
import hashlib
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ftray.config.data import SourceConfig
from ftray.data.rows import JoinedRows, Rows, read_json, read_table, read_texts
from ftray.errors import DataError, FtrayError
from ftray.storage import local_copies
from ftray.storage.cache import cache_directory
from ftray.storage.manifest import MANIFEST

READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": read_json,
    ".ndjson": read_json,
    ".json": read_json,
    ".csv": lambda path: read_table(path, delimiter=","),
    ".tsv": lambda path: read_table(path, delimiter="\t"),
    ".txt": read_texts,
}
PARQUET = ".parquet"
PACKED = (".gz", ".zst")
KINDS = ", ".join([*READERS, PARQUET])
NOTES = ("dataset_infos.json",)  # of a hub's data set, beside its files
SAVED = ("dataset_info.json", "state.json", "dataset_dict.json")  # of `datasets.save_to_disk`


def kind_of(path: Path) -> str:
    """Its ending, in lower case and without that of its packing."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return next((suffix for suffix in reversed(suffixes) if suffix not in PACKED), "")


def is_known(path: Path) -> bool:
    return kind_of(path) in READERS or (kind_of(path) == PARQUET and path.suffix.lower() == PARQUET)


def check_source(key: str, source: str) -> None:
    """What costs nothing to know before any work: the file is there and of a known kind. Raises `DataError`."""
    path = Path(source)
    if is_several(source):
        files_in(key, source)
        return
    if path.is_dir():
        return
    if (path.is_file() or "://" in source) and is_known(path):
        return
    if path.is_file() or "://" in source:
        raise DataError(f"{key}: {source}: unknown kind of file; use {KINDS}, also with {' or '.join(PACKED)}")
    if path.exists():
        raise DataError(f"{key}: {source}: is no file but a pipe or device; write the rows to a file first")
    if is_known(path) or source.count("/") != 1 or source.startswith("."):
        names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, names, n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else f" (looked from {Path.cwd()})"
        raise DataError(f"{key}: {source}: no such file{hint}")


def is_several(source: str) -> bool:
    """A glob, or a directory of files that was not saved by `datasets`. A path that exists is that path."""
    path = Path(source)
    if path.is_dir():
        return not any((path / name).is_file() for name in SAVED)
    return "://" not in source and not path.exists() and glob.has_magic(source)


def files_in(key: str, source: str) -> list[Path]:
    """Of a directory or a glob, in the order of their names, all of one kind. Raises `DataError`."""
    path = Path(source)
    found = path.iterdir() if path.is_dir() else map(Path, glob.glob(source, recursive=True))
    files = sorted(
        file for file in found if file.is_file() and is_known(file) and not file.name.startswith((".", *NOTES))
    )
    if not files:
        raise DataError(f"{key}: {source}: has no file of a kind that is read ({KINDS})")
    if len(kinds := sorted({kind_of(file) for file in files})) > 1:
        raise DataError(f"{key}: {source}: has files of several kinds ({', '.join(kinds)}); give a glob of one")
    return files


def load_source(key: str, source: SourceConfig) -> Rows:
    """Raises `DataError` naming the source when it cannot be read or is empty."""
    rows = load_rows(key, source.path, split=source.split, subset=source.subset, revision=source.revision)
    return rows if source.limit is None else rows.select(range(min(source.limit, len(rows))))


def load_rows(
    key: str, source: str, *, split: str | None = None, subset: str | None = None, revision: str | None = None
) -> Rows:
    """`split`: of a hub id or a saved directory; None: train. Raises `DataError` as `load_source` does."""
    check_source(key, source)
    if (split or subset or revision) and (is_several(source) or local_file(key, source).is_file()):
        raise DataError(f"{key}: {source}: split, subset and revision are of a hub id, and this is a file")
    if is_several(source):
        rows: Rows = JoinedRows([read_file(key, str(file), file) for file in files_in(key, source)])
    elif (path := local_file(key, source)).is_file():
        rows = read_file(key, source, path)
    else:
        rows = of_datasets(key, source, path, split=split, subset=subset, revision=revision)
    if len(rows) == 0:
        raise DataError(f"{key}: {source}: has no rows")
    return rows


def read_file(key: str, source: str, path: Path) -> Rows:
    if path.stat().st_size == 0:
        raise DataError(f"{key}: {source}: the file is empty")
    if kind_of(path) == PARQUET:
        return of_datasets(key, source, path)
    try:
        return READERS[kind_of(path)](unpacked(path))
    except DataError as error:
        raise DataError(f"{key}: {source}: {error}") from None


def unpacked(path: Path) -> Path:
    """The file, or what a packed one holds, kept by its content. Raises `DataError`."""
    packing = path.suffix.lower()
    if packing not in PACKED:
        return path
    place = cache_directory() / "unpacked" / f"{file_digest(path)}{kind_of(path)}"
    if place.is_file():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    staging = place.with_name(f"{place.name}.new")
    try:
        with open_packed(path, packing) as stream, staging.open("wb") as file:
            shutil.copyfileobj(stream, file)
    except (OSError, EOFError) as error:
        staging.unlink(missing_ok=True)
        raise DataError(f"cannot be unpacked: {error}") from None
    staging.replace(place)
    return place


def open_packed(path: Path, packing: str) -> Any:
    if packing == ".gz":
        return gzip.open(path)
    import pyarrow

    return pyarrow.input_stream(str(path), compression="zstd")


def of_datasets(
    key: str,
    source: str,
    path: Path,
    *,
    split: str | None = None,
    subset: str | None = None,
    revision: str | None = None,
) -> Any:
    """What Hugging Face `datasets` reads: parquet, a saved directory, a hub id. Raises `DataError`."""
    import datasets
    from datasets.config import HF_DATASETS_CACHE
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    datasets.disable_progress_bars()
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # what it logs of a file is said in the error
    try:
        if path.is_dir():
            rows = datasets.load_from_disk(str(path))
        elif path.is_file():
            # By content: `datasets` itself takes a file of the same name and time for the same one.
            kept = str(Path(HF_DATASETS_CACHE) / "ftray" / file_digest(path))
            rows = datasets.load_dataset("parquet", data_files=glob.escape(str(path)), split="train", cache_dir=kept)
        else:
            rows = datasets.load_dataset(source, subset, revision=revision, split=split or "train")
    except (DatasetGenerationError, DatasetNotFoundError) as error:
        raise DataError(f"{key}: {source}: cannot be read: {root_cause(error)}") from None
    except (OSError, ValueError) as error:
        if any(words in str(error) for words in ("corresponds to no data", "BatchSize")):  # as `datasets` says it
            raise DataError(f"{key}: {source}: has no rows") from None
        place = str(error.filename or "") if isinstance(error, OSError) else ""
        if place.startswith(str(HF_DATASETS_CACHE)):
            raise DataError(
                f"HF_HOME: {HF_DATASETS_CACHE} cannot be written ({root_cause(error)}), where `datasets` "
                f"keeps what it reads of {key}; set HF_HOME (or HF_DATASETS_CACHE) to a directory that can"
            ) from None
        raise DataError(f"{key}: {source}: cannot be read: {root_cause(error)}") from None
    if isinstance(rows, datasets.DatasetDict):
        if split in rows:
            return rows[split]
        raise DataError(f"{key}: {source}: holds the splits {', '.join(map(str, rows))}; name one with split")
    if split is not None and path.is_dir():
        raise DataError(f"{key}: {source}: holds one set of rows and no split {split!r}")
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
        raise DataError(f"{key}: {source}: is no single file; give one of {KINDS}")
    return paths[0]


def source_digest(source: str, rows: Any) -> str:
    """Of its content: the bytes of a file or of several; for a saved directory or hub id, the fingerprint that
    `datasets` keeps."""
    path = local_file("data", source)
    if path.is_file():
        return file_digest(path)
    if isinstance(rows, JoinedRows):
        digests = [f"{file.name} {file_digest(file)}" for file in files_in("data", source)]
        return hashlib.sha256("\n".join(digests).encode()).hexdigest()
    return rows._fingerprint


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
