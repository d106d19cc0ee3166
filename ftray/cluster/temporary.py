"""Where a session of Ray's of our own lies: RAY_TMPDIR, else TMPDIR, else /tmp, made fit for its sockets."""

import os
import tempfile
from pathlib import Path

from ftray.errors import UserError

RAY_TMPDIR, TMPDIR, DEFAULT = "RAY_TMPDIR", "TMPDIR", "/tmp"
SOCKET_BYTES = 107  # of a Unix socket's path on Linux
SOCKET = "/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.1"


def settle_temporary_directory() -> Path:
    """Sets RAY_TMPDIR where Ray would read the environment in a way that cannot work: empty is unset, relative is made
    absolute, and a TMPDIR too long for a socket's path is passed over. Raises `UserError`."""
    if not os.environ.get(RAY_TMPDIR, "x"):
        del os.environ[RAY_TMPDIR]
    place, source = place_of_sessions()
    if is_too_long(place):
        room = SOCKET_BYTES - len(SOCKET)
        raise UserError(
            f"{RAY_TMPDIR}: {place} is too long: below it lie Ray's sockets, whose paths have {SOCKET_BYTES} bytes "
            f"at most; give a path of at most {room} bytes, such as {DEFAULT}"
        )
    refuse_unusable(place, source)
    if RAY_TMPDIR in os.environ or (TMPDIR in os.environ and str(place) != os.environ[TMPDIR]):
        os.environ[RAY_TMPDIR] = str(place)
    return place / "ray"


def place_of_sessions() -> tuple[Path, str]:
    """What holds the directory `ray`, and the variable that says so."""
    source = RAY_TMPDIR if os.environ.get(RAY_TMPDIR) else TMPDIR
    place = Path(os.environ.get(source) or DEFAULT).expanduser().absolute()
    return (Path(DEFAULT), source) if source == TMPDIR and is_too_long(place) else (place, source)


def is_too_long(place: Path) -> bool:
    return len(os.fsencode(f"{place}{SOCKET}")) > SOCKET_BYTES


def refuse_unusable(place: Path, source: str) -> None:
    try:
        (place / "ray").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place / "ray"):
            pass
    except OSError as error:
        raise UserError(
            f"{source if source in os.environ else DEFAULT}: Ray keeps its session in {place / 'ray'}, which cannot be "
            f"written ({error.strerror}); set {RAY_TMPDIR} to a directory that can"
        ) from None
