"""What keeps the memory of a process flat that serves for weeks."""

import ctypes
import gc
import sys


def keep_out_of_collections() -> None:
    """What a process holds when it is ready, half a million objects of libraries, stays: without it a full collection
    takes a tenth of a second, so Python does few of them, and garbage piles up for minutes."""
    gc.collect()
    gc.freeze()


def give_back_free_memory() -> None:
    """What glibc's allocator keeps of freed memory returns to the machine: with a dozen threads it keeps some in an
    arena of each, which under load comes to half as much again as is used. A few milliseconds."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # musl has none
        libc.malloc_trim(0)
