"""Before a model is loaded: do the workers reach each other, and how fast?"""

import time

import torch
import torch.distributed as dist

from ftray.errors import UserError
from ftray.model.hardware import Hardware

ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}  # float32: 4 MiB between CPUs, 256 MiB between GPUs
TIMEOUT_S = 120.0
POLL_S = 0.05


def measure_all_reduce(hardware: Hardware, *, timeout_s: float = TIMEOUT_S) -> float | None:
    """Bus bandwidth of an all-reduce over all workers, in bytes a second; None for one worker. (As NCCL's tests define
    it: 2 (n - 1) / n of the buffer over the time.) Raises `UserError` when nothing arrives in time.
    """
    size = dist.get_world_size()
    if size == 1:
        return None
    buffer = torch.ones(ELEMENTS[hardware.device.type], device=hardware.device)
    try:
        finish_all_reduce(buffer, timeout_s)  # connects
        began = time.perf_counter()
        finish_all_reduce(buffer, timeout_s)
        if hardware.device.type == "cuda":
            torch.cuda.synchronize(hardware.device)
        seconds = time.perf_counter() - began
    except RuntimeError as error:  # of gloo and NCCL, connections that break included
        raise unreachable(hardware, str(error).strip().splitlines()[0]) from None
    if buffer[0].item() != size * size:
        raise UserError(
            f"the workers' all-reduce gave {buffer[0].item():g} instead of {size * size}; look at the network"
        )
    return 2 * (size - 1) / size * buffer.numel() * buffer.element_size() / seconds


def finish_all_reduce(buffer: torch.Tensor, timeout_s: float) -> None:
    work = dist.all_reduce(buffer, async_op=True)
    assert work is not None
    deadline = time.monotonic() + timeout_s
    while not work.is_completed():
        if time.monotonic() > deadline:
            raise RuntimeError(f"nothing arrived within {timeout_s:.0f} s")
        time.sleep(POLL_S if timeout_s - (deadline - time.monotonic()) > 1 else 0.0)
    work.wait()


def unreachable(hardware: Hardware, reason: str) -> UserError:
    variable = "NCCL_SOCKET_IFNAME" if hardware.backend == "nccl" else "GLOO_SOCKET_IFNAME"
    return UserError(
        f"the workers found each other but cannot exchange data ({hardware.backend}: {reason}); set {variable} to the "
        "network interface that the hosts share, and open the ports between them"
    )


def describe_bandwidth(bytes_per_s: float | None) -> str:
    return "" if bytes_per_s is None else f", all-reduce at {bytes_per_s / 1e9:.2g} GB/s"
