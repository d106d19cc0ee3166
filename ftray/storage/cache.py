"""Where this machine keeps what can be fetched or made again."""

import os
import tempfile
from pathlib import Path

import platformdirs

from ftray.errors import UserError

XDG = "XDG_CACHE_HOME"


def cache_directory() -> Path:
    """In the user's cache (XDG_CACHE_HOME, else ~/.cache). Where that cannot be written, as in a container whose user
    has no home, in one of this user's alone in the directory for temporary files. Raises `UserError`."""
    place = Path(platformdirs.user_cache_dir("ftray"))
    if can_be_written(place):
        return place
    if os.environ.get(XDG):
        raise UserError(f"{XDG}: {place} cannot be written; set it to a directory that can")
    spare = Path(tempfile.gettempdir()) / f"ftray-cache-{os.getuid()}"
    try:
        spare.mkdir(mode=0o700, exist_ok=True)
        found = spare.lstat()
        if spare.is_symlink() or found.st_uid != os.getuid() or found.st_mode & 0o022:
            raise PermissionError(13, "another user may write it")
    except OSError as error:
        raise UserError(
            f"{XDG}: neither {place} nor {spare} can be written ({error.strerror}); set it to a directory that can"
        ) from None
    return spare


def can_be_written(place: Path) -> bool:
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(place, os.W_OK)
