"""What the usual chips have, from their makers' data sheets: dense bfloat16 rates, memory, links."""

import difflib
from dataclasses import dataclass, replace
from typing import Literal

import psutil

from ftray.errors import UserError
from ftray.storage.machine import usable_cores


@dataclass(frozen=True)
class Gpu:
    name: str
    memory_gib: float
    tflops: float  # dense bfloat16, without sparsity
    link_gb_s: float  # to a neighbour on the same node, each way
    network_gb_s: float  # to another node, each way, a GPU's share
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    context_gib: float = 1.2  # CUDA's context, NCCL's buffers and what the allocator cannot use

    @property
    def bytes_per_weight(self) -> int:
        return 2 if self.dtype == "bfloat16" else 4


CPU = Gpu("cpu", 16, 0.1, 5, 1, dtype="float32", context_gib=0)
CPU_TFLOPS_PER_CORE = 0.1  # float32; a server core of 2023 with AVX-512
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h100-80gb", 80, 989, 450, 50),
        Gpu("h200-141gb", 141, 989, 450, 50),
        Gpu("b200-180gb", 180, 2250, 900, 50),
        Gpu("a100-80gb", 80, 312, 300, 25),
        Gpu("a100-40gb", 40, 312, 300, 25),
        Gpu("l40s-48gb", 48, 362, 32, 12.5),
        Gpu("a10g-24gb", 24, 70, 16, 3),
        Gpu("l4-24gb", 24, 121, 16, 3),
        Gpu("rtx4090-24gb", 24, 165, 16, 3),
        Gpu("rtx3090-24gb", 24, 71, 16, 3),
    )
}


def find_gpu(name: str, *, workers: int) -> Gpu:
    """`cpu` is this machine without GPUs, shared by all its workers. Raises `UserError`."""
    if name == CPU.name:
        memory = psutil.virtual_memory().total / 2**30 / workers
        return replace(CPU, memory_gib=memory, tflops=CPU_TFLOPS_PER_CORE * usable_cores() / workers)
    if name not in GPUS:
        near = [known for known in GPUS if known.startswith(name)] or difflib.get_close_matches(name, GPUS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"--gpu: {name!r} is not known{hint}; known are {', '.join([*GPUS, CPU.name])}")
    return GPUS[name]
