"""Memory in pages of 2 MiB, where Linux has them.

A core that reads gigabytes in turn looks up the place of every page, and what is fetched ahead waits for that.
"""

import contextlib
import mmap

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes: a line of the cache
BLOCK_BYTES = 64 * 2**20


def aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def empty_bytes(count: int, device: torch.device) -> Tensor:
    """One block of memory. On a CPU in huge pages, whatever `THP_MEM_ALLOC_ENABLE` says."""
    if device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(count, dtype=torch.uint8, device=device)
    memory = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory has none
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


class HugePages:
    """A CPU's tensors side by side in blocks of 64 MiB: a tensor of a few MiB on its own would have small pages at its
    beginning and its end. A block lives as long as any of its tensors; what none of them uses takes no memory."""

    def __init__(self):
        self._left = torch.empty(0, dtype=torch.uint8)

    def floats(self, count: int) -> Tensor:
        """Uninitialised."""
        size = 4 * count
        if size >= BLOCK_BYTES:  # a block of its own, and what is left of the last is for others
            return empty_bytes(size, torch.device("cpu")).view(torch.float32)
        if aligned(size) > len(self._left):
            self._left = empty_bytes(BLOCK_BYTES, torch.device("cpu"))
        taken, self._left = self._left[:size], self._left[aligned(size) :]
        return taken.view(torch.float32)
