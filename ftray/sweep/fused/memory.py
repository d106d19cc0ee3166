"""How many members a group's memory holds: each has float32 weights, their gradients and AdamW's two moments."""

import contextlib
from collections.abc import Sequence
from typing import Any

import psutil
import torch

from ftray.config.adapter import AdapterConfig
from ftray.errors import AdapterError
from ftray.model.adapters.lora import num_lora_parameters
from ftray.model.hardware import Hardware

BYTES_EACH = 4 * 4  # of a parameter: weight, gradient, two moments
BYTES_REDUCED = 2 * 4  # more where several workers add their gradients up: the flat copy, and what it is made of
SHARE_BEFORE = 0.5  # of the free memory, before a step has shown what activations take
SHARE_AFTER = 0.9


class MemoryBudget:
    def __init__(
        self, model: Any, adapters: Sequence[AdapterConfig], hardware: Hardware, *, world_size: int, ranks_per_node: int
    ):
        """`model`: the base, before any member is on it. `adapters`: what members may have."""
        each = BYTES_EACH + (BYTES_REDUCED if world_size > 1 else 0)
        sizes = [1]
        for adapter in adapters:
            with contextlib.suppress(AdapterError):  # a member's own fault, told when it is to join
                sizes.append(num_lora_parameters(model, adapter))
        self.largest = max(sizes) * each  # bytes
        self._on_gpu = hardware.device.type == "cuda"
        self._ranks_per_node = ranks_per_node  # a node's memory is theirs together; a GPU is one rank's
        self._most = 0  # members so far, at a time

    def left(self, num_members: int, *, has_trained: bool) -> int:
        """For so many more, though one member at least is tried."""
        self._most = max(self._most, num_members)
        count = int(self.free * (SHARE_AFTER if has_trained else SHARE_BEFORE) // self.largest)
        if self._on_gpu:
            count += self._most - num_members  # the peak counts those that have left
        return max(count, 0 if num_members else 1)

    @property
    def free(self) -> int:
        """Bytes beside the largest step so far."""
        if self._on_gpu:
            total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
            return total - torch.cuda.max_memory_reserved()
        return psutil.virtual_memory().available // self._ranks_per_node

    def describe(self, *, slots: int) -> str:
        fits = self.left(0, has_trained=False)
        held = f"{min(slots, fits)} at a time" + (" (more would not fit)" if fits < slots else "")
        return f"the largest adapter takes {self.largest / 2**20:,.0f} MiB of {self.free / 2**30:,.1f} GiB free: {held}"
