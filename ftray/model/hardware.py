"""The one place that chooses device, dtype and communication backend, and says why."""

from dataclasses import dataclass

import torch

from ftray.storage.machine import usable_cores


@dataclass(frozen=True)
class Hardware:
    device: torch.device
    dtype: torch.dtype
    backend: str  # of torch.distributed
    reason: str
    gpu_share: float = 1.0  # of the chip: others have the rest

    @property
    def dtype_name(self) -> str:
        """Such as "bfloat16"."""
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        return f"{self.device.type}, {self.dtype_name}, packed sdpa attention, {self.backend} ({self.reason})"


def choose_hardware(*, use_gpu: bool = True, gpu_share: float = 1.0) -> Hardware:
    """CUDA with bfloat16 where the chip has it; else, or where the config gives no GPU, CPU in float32.

    bfloat16 without hardware support is emulated, hundreds of times slower than float32, so it is never chosen
    on a CPU; float16 needs loss scaling and overflows with language models, so it is never chosen at all.
    """
    if use_gpu and torch.cuda.is_available():
        index = torch.cuda.current_device()
        device, name = torch.device("cuda", index), torch.cuda.get_device_name(index)
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Hardware(device, torch.bfloat16, "nccl", f"{name} has bfloat16", gpu_share)
        return Hardware(device, torch.float32, "nccl", f"{name} has no bfloat16", gpu_share)
    return Hardware(
        torch.device("cpu"),
        torch.float32,
        "gloo",
        f"{'no GPU' if use_gpu else 'no GPU asked for'}, {usable_cores()} cores",
    )


def make_deterministic(*, num_threads: int) -> None:
    """Bitwise the same run after run on CPU: fixed threads, deterministic kernels."""
    torch.set_num_threads(num_threads)
    if not torch.cuda.is_available():
        torch.use_deterministic_algorithms(True)
