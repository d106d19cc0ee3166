"""A reader sees the old file or the new one, never a part, and a power cut leaves one of the two: the content and then
the directory reach the disk before the writer goes on."""

import errno
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ftray.errors import DamagedError

NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)  # FAT, some FUSE


def write_bytes(path: Path, content: bytes | Path) -> None:
    """`content`: of a file, where it is a path."""
    temporary = write_beside(path, content)
    try:
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def create_bytes(path: Path, content: bytes | Path) -> None:
    """Raises `FileExistsError` where the file is there already; of several writers one succeeds."""
    temporary = write_beside(path, content)
    try:
        try:
            os.link(temporary, path)
        except OSError as error:
            if error.errno not in NO_HARD_LINKS:
                raise
            with path.open("xb") as claimed:  # a reader may see it empty for a moment
                claimed.write(temporary.read_bytes())
                claimed.flush()
                os.fsync(claimed.fileno())
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def write_beside(path: Path, content: bytes | Path) -> Path:
    """A temporary file in the same directory, on the disk as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            if isinstance(content, Path):
                with content.open("rb") as source:
                    shutil.copyfileobj(source, file, 1 << 20)
            else:
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def sync_directory(directory: Path) -> None:
    """The names in it reach the disk."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a filesystem that does not do it for directories
            raise
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Raises `DamagedError` where it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path}: not a JSON file ({error}); it was cut short or overwritten") from None
