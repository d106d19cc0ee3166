"""Measures what a training process holds at its peak, beside the libraries: the product's engine on gloo ranks.

python tests/parity/memory.py   measures and prints all of `CASES` (a few minutes)
"""

import gc
import os
import socket
import sys
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

sys.path.insert(0, str(Path(__file__).parents[1]))

MIB = 2**20


def write_model(directory: Path) -> Path:
    """Large enough that weights, gradients, moments and activations stand out, small enough for a test."""
    from tiny import write_tiny_model

    return write_tiny_model(
        directory,
        tied=False,
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=8192,
    )


def measure(world_size: int, settings: dict[str, Any], base: Path, out: Path) -> float:
    """Bytes of rank 0 at its peak in a few steps, without what the process held before the model."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Freed blocks go back to the system at once, so that the peak is what is in use.
    os.environ.update(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536", MALLOC_ARENA_MAX="2")
    multiprocessing.spawn(run_rank, args=(world_size, port, settings, str(base), out), nprocs=world_size, join=True)
    return torch.load(out)


def run_rank(rank: int, world_size: int, port: int, settings: dict[str, Any], base: str, out: Path) -> None:
    import torch.distributed as dist

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), HF_HUB_OFFLINE="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), DS_ACCELERATOR="cpu")
    import peft  # noqa: F401  code is no part of the model either
    from transformers.integrations import HfDeepSpeedConfig  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    from ftray.model.base import prepare_base
    from ftray.model.hardware import choose_hardware, make_deterministic
    from ftray.train.engine.build import make_engine

    make_deterministic(num_threads=2 // world_size)

    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    config = make_config(settings, base, world_size)
    before = resident()
    engine = make_engine(config, prepare_base(base), choose_hardware(use_gpu=False))
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew: loading is over
    row = full_row(config.batch.tokens_per_micro_batch)
    for num_rows in (1, 2):  # AdamW's state exists from the first update on
        engine.forward_backward([row] * num_rows, denominator=num_rows * len(row.rows_N))
        engine.optim_step(lr=1e-5)
    if rank == 0:
        torch.save(float(peak() - before), out)
    dist.barrier()
    dist.destroy_process_group()


def make_config(settings: dict[str, Any], base: str, world_size: int) -> Any:
    from ftray.config import parse_config

    text = f"kind: run\nname: memory\nbase_model: {base}\ndata: {{train: x}}\nmax_steps: 1\n"
    tokens = {"batch.tokens_per_micro_batch": 1024, "data.max_example_tokens": 512}
    overrides = tokens | {"workers.count": world_size} | settings
    return parse_config(text, [f"{key}={value}" for key, value in overrides.items()], kind="run", source="memory")


def full_row(tokens: int) -> Any:
    """Two examples that fill a micro-batch, every token trained."""
    from ftray.model.packed import PackedRow
    from ftray.model.packed_attention import packed_layout

    ids = torch.arange(tokens) % 200
    rows = torch.arange(tokens - 1)
    half = torch.arange(tokens // 2)
    return PackedRow(
        ids, torch.cat([half, half]), rows, ids[1:], torch.ones(tokens - 1), (rows >= tokens // 2).long(),
        packed_layout([tokens // 2] * 2),
    )  # fmt: skip


def status(key: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) * 1024


def resident() -> int:
    return status("VmRSS:")


def peak() -> int:
    return status("VmHWM:")


FULL = {"adapter": "null"}
LONG = {"batch.tokens_per_micro_batch": 2048}
CHECKPOINTED = LONG | {"memory.activation_checkpointing": "true"}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "full-z0": (1, FULL | {"zero.stage": 0}),
    "full-z1": (1, FULL | {"zero.stage": 1}),
    "full-z2": (1, FULL),
    "full-z3": (1, FULL | {"zero.stage": 3}),
    "full-z1-2-ranks": (2, FULL | {"zero.stage": 1}),
    "full-z2-2-ranks": (2, FULL),
    "full-z3-2-ranks": (2, FULL | {"zero.stage": 3}),
    "full-z2-long": (1, FULL | LONG),
    "full-z2-checkpointed": (1, FULL | CHECKPOINTED),
    "lora-z0": (1, {"zero.stage": 0}),
    "lora-z2": (1, {}),
    "lora-z2-rank-128": (1, {"adapter.rank": 128}),
    "lora-z3-2-ranks": (2, {"zero.stage": 3}),
    "lora-z2-checkpointed": (1, CHECKPOINTED),
    "lora-z2-shared-rows": (2, LONG | {"memory.sequence_parallel": 2}),
}


def planned(world_size: int, settings: dict[str, Any], base: Path) -> Any:
    from ftray.plan.gpus import CPU
    from ftray.plan.measure import measure_model
    from ftray.plan.memory import plan_memory
    from ftray.plan.model_size import read_model_config

    config = make_config(settings, str(base), world_size)
    size = measure_model(read_model_config(str(base)), config.adapter, dtype="float32")
    return plan_memory(config, size, CPU, workers=world_size)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        model = write_model(Path(scratch) / "model")
        for name, (world_size, settings) in CASES.items():
            found = measure(world_size, settings, model, Path(scratch) / "out.pt")
            parts = planned(world_size, settings, model)
            print(
                f"{name:22} measured {found / MIB:5.0f} MiB, planned {parts.total / MIB:5.0f}, "
                f"ratio {parts.total / found:.2f}",
                {part: round(value / MIB) for part, value in vars(parts).items()},
                flush=True,
            )
