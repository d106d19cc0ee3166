"""Where this process and those that it has started listen."""

import ipaddress
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

EVERY_S = 1.0


def listening() -> set[tuple[str, str]]:
    """(process, address) of every listening TCP socket."""
    here = psutil.Process()
    found = set()
    for process in [here, *here.children(recursive=True)]:
        try:
            sockets = process.net_connections(kind="tcp")
            found |= {(process.name(), s.laddr.ip) for s in sockets if s.status == psutil.CONN_LISTEN}
        except psutil.Error:  # it has ended meanwhile
            continue
    return found


def for_others(found: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Those that another machine could reach."""

    def is_own(address: str) -> bool:
        ip = ipaddress.ip_address(address)
        return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback

    return {(process, address) for process, address in found if not is_own(address)}


@contextmanager
def watched() -> Iterator[set[tuple[str, str]]]:
    """All that listen at some time while it is open."""
    seen: set[tuple[str, str]] = set()
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(EVERY_S):
            seen.update(listening())

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()
