"""Ends what a Ray session leaves behind when its driver was killed: a process of its own that reads a pipe until the
driver, which holds the other end, is gone. Ray's agents would stay for a minute with their 200 MiB.

The session's processes, and no others, have a mark in their environment, or, where they have written their title over
it, files of the session's directory open. Nothing but the standard library is imported.
"""

import os
import signal
import sys
import time

MARK = "FTRAY_SESSION"
GRACE_S = 3.0  # most of Ray's processes end by themselves
UNTIL_S = 10.0


def of_session(mark: str, directory: str = "") -> list[int]:
    """Processes that were started with `mark` (NAME=VALUE) in their environment, or have a file of `directory` open."""
    return [number for number in numbers() if has_mark(number, mark) or (directory and has_open(number, directory))]


def numbers() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()]


def has_mark(number: int, mark: str) -> bool:
    try:
        with open(f"/proc/{number}/environ", "rb") as file:
            return mark.encode() in file.read().split(b"\0")
    except OSError:  # it has ended, or is another user's
        return False


def has_open(number: int, directory: str) -> bool:
    try:
        for name in os.listdir(f"/proc/{number}/fd"):
            if os.readlink(f"/proc/{number}/fd/{name}").startswith(f"{directory}/"):
                return True
    except OSError:
        pass
    return False


def reap(mark: str, directory: str) -> None:
    began = time.monotonic()
    while (left := of_session(mark, directory)) and time.monotonic() - began < UNTIL_S:
        if time.monotonic() - began > GRACE_S:
            for number in left:
                try:
                    os.kill(number, signal.SIGKILL)
                except OSError:
                    continue
        time.sleep(0.2)


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # those are the driver's
        signal.signal(number, signal.SIG_IGN)
    said = b""
    while piece := os.read(0, 4096):  # the session's directory, once it is known
        said += piece
    reap(sys.argv[1], os.fsdecode(said))


if __name__ == "__main__":
    main()
