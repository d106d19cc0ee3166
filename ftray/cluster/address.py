"""RAY_ADDRESS: the cluster that a command joins."""

import os
import re
import socket

from ftray.cluster.temporary import settle_temporary_directory
from ftray.errors import UserError

ADDRESS = "RAY_ADDRESS"
CONNECT_S = 3.0
NATIVE = re.compile(r"\[?([\w.:-]+?)\]?:(\d{1,5})")


def check_address() -> None:
    """Its form, that somebody listens there, and without one that Ray can start a session here. That a cluster answers,
    Ray finds. Raises `UserError`."""
    address = os.environ.get(ADDRESS, "")
    if not joins_cluster():
        settle_temporary_directory()
        return
    if address == "auto":
        return
    if address.startswith(("http://", "https://")):
        raise refused(address, "is the address of a dashboard, for `ftray submit --address`; give the head's HOST:PORT")
    if address.startswith("ray://"):
        raise refused(address, "is one for Ray Client, which no command uses; run it on the cluster (`ftray submit`)")
    found = NATIVE.fullmatch(address)
    if found is None:
        raise refused(address, "is none: give the head's HOST:PORT (Ray's own port, often 6379), auto, or nothing")
    try:
        socket.create_connection((found[1], int(found[2])), timeout=CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise no_cluster(address, error) from None


def joins_cluster() -> bool:
    """Else a command starts a session of its own."""
    return os.environ.get(ADDRESS, "") not in ("", "local")


def refused(address: str, why: str) -> UserError:
    return UserError(f"{ADDRESS}: {address} {why}")


def no_cluster(address: str | None, error: Exception) -> UserError:
    return UserError(f"{ADDRESS}: {address}: no Ray cluster answers there ({error}); unset or fix it")
