"""What keeps the memory of a process flat that serves for weeks."""

import ctypes
import gc
import os
import sys

M_ARENA_MAX = -8  # malloc.h
NUM_ARENAS = 2


def keep_few_arenas() -> None:
    """glibc's allocator gives each of a process's dozen threads an arena of its own, and memory that one thread frees
    serves none of the others: what is held then creeps up for hours while what is used stays the same."""
    if libc := _glibc():
        libc.mallopt(M_ARENA_MAX, NUM_ARENAS)


def ask_for_huge_pages() -> None:
    """Tensors of more than 2 MiB lie in pages of 2 MiB, if Linux has some, and a CPU decodes about a twentieth faster.
    Torch looks at it before the first tensor of a process."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def keep_out_of_collections() -> None:
    """What a process holds when it is ready, half a million objects of libraries, stays: without it a full collection
    takes a tenth of a second, so Python does few of them, and garbage piles up for minutes."""
    gc.collect()
    gc.freeze()


def give_back_free_memory() -> None:
    """What glibc's allocator keeps of freed memory returns to the machine: with a dozen threads it keeps some in an
    arena of each, which under load comes to half as much again as is used. A few milliseconds."""
    if libc := _glibc():
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    is_glibc = sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim")  # musl has none
    return libc if is_glibc else None
