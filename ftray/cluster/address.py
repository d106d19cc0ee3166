"""RAY_ADDRESS: the cluster that a command joins."""

import os
import re
import socket

from ftray.errors import UserError

ADDRESS = "RAY_ADDRESS"
CONNECT_S = 5.0


def check_address() -> None:
    """Raises `UserError` where it names a host and port at which nobody listens; that a cluster answers, Ray finds."""
    address = os.environ.get(ADDRESS, "")
    found = re.fullmatch(r"(?:ray://)?\[?([\w.:-]+?)\]?:(\d+)", address)
    if found is None:
        return
    try:
        socket.create_connection((found[1], int(found[2])), timeout=CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise no_cluster(address, error) from None


def no_cluster(address: str | None, error: Exception) -> UserError:
    return UserError(f"{ADDRESS}: {address}: no Ray cluster answers there ({error}); unset or fix it")
