"""Before a model is loaded: do the workers reach each other, and how fast?"""

import threading
import time

import torch
import torch.distributed as dist

from ftray.errors import UserError
from ftray.model.flops import synchronize
from ftray.model.hardware import Hardware

ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}  # float32: 4 MiB between CPUs, 256 MiB between GPUs
TIMEOUT_S = 120.0


def measure_all_reduce(hardware: Hardware, *, timeout_s: float = TIMEOUT_S) -> float | None:
    """Bus bandwidth of an all-reduce over all workers, in bytes a second; None for one worker. (As NCCL's tests define
    it: 2 (n - 1) / n of the buffer over the time.) Raises `UserError` when nothing arrives in time.
    """
    size = dist.get_world_size()
    if size == 1:
        return None
    buffer = torch.ones(ELEMENTS[hardware.device.type], device=hardware.device)
    all_reduce_in_time(buffer, hardware, timeout_s)  # connects
    began = time.perf_counter()
    all_reduce_in_time(buffer, hardware, timeout_s)
    seconds = time.perf_counter() - began
    if buffer[0].item() != size * size:
        raise UserError(
            f"the workers' all-reduce gave {buffer[0].item():g} instead of {size * size}; look at the network"
        )
    return 2 * (size - 1) / size * buffer.numel() * buffer.element_size() / seconds


def all_reduce_in_time(buffer: torch.Tensor, hardware: Hardware, timeout_s: float) -> None:
    """In a thread of its own: NCCL connects inside the first call, and does not come back from that."""
    failure: list[str] = []

    def reduce() -> None:
        try:
            if hardware.device.type == "cuda":
                torch.cuda.set_device(hardware.device)
            dist.all_reduce(buffer)
            synchronize(hardware)
        except RuntimeError as error:  # of gloo and NCCL, connections that break included
            failure.append(str(error).strip().splitlines()[0])

    thread = threading.Thread(target=reduce, name="all-reduce", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        failure.append(f"nothing arrived within {timeout_s:.0f} s")
    if failure:
        raise unreachable(hardware, failure[0])


def unreachable(hardware: Hardware, reason: str) -> UserError:
    variable = "NCCL_SOCKET_IFNAME" if hardware.backend == "nccl" else "GLOO_SOCKET_IFNAME"
    return UserError(
        f"the workers found each other but cannot exchange data ({hardware.backend}: {reason}); set {variable} to the "
        "network interface that the hosts share, and open the ports between them"
    )


def describe_bandwidth(bytes_per_s: float | None) -> str:
    return "" if bytes_per_s is None else f", all-reduce at {bytes_per_s / 1e9:.2g} GB/s"
