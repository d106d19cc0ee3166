"""The runs whose losses are kept: every objective with every method, at one rank and at two, at each ZeRO stage.

A run is four steps of eight examples of made-up rows on a random model of two layers (tests/tiny.py), with warm-up,
weight decay and clipping. The learning rate is low: at a high one the last bit that another machine computes
otherwise grows to 1e-5 in four steps.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from groups import fused_on_ranks
from ranks import Record, train_on_ranks
from tiny import chat_rows, pair_rows, write_jsonl, write_tiny_model

LOSSES = Path(__file__).parent / "losses.json"
OBJECTIVES = {"sft": "{type: sft}", "domain": "{type: text}", "dpo": "{type: dpo, beta: 0.2}"}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "qlora": {"settings": {"adapter.quantize_base": "nf4"}},
    "full": {"full": True},
}
STAGES = {"lora": (0, 2, 3), "qlora": (0, 2), "full": (0, 2, 3)}  # nf4 needs whole weights
# For rows of 64 weights or a multiple, which is what nf4's blocks are computed right for on a CPU.
SIZES = {"intermediate_size": 128}
BUDGET = 512  # tokens of a micro-batch: a step has several
RATE = {"optimizer.learning_rate": 1e-4}


def records() -> list[Record]:
    """Alone: `sft-lora-z2-2-ranks`."""
    return [
        Record(
            f"{objective}-{method}-z{stage}-{size}-rank{'s' if size > 1 else ''}",
            world_size=size,
            stage=stage,
            tokens_per_micro_batch=BUDGET,
            full=how.get("full", False),
            settings={"objective": text} | RATE | how.get("settings", {}),
        )
        for objective, text in OBJECTIVES.items()
        for method, how in METHODS.items()
        for stage in STAGES[method]
        for size in (1, 2)
    ]


def members(objective: str) -> list[Record]:
    """Side by side in one group: two adapters that differ in rank, rate and batch."""
    settings = {"objective": OBJECTIVES[objective]} | RATE
    other = {"adapter": "{rank: 8, alpha: 8}", "optimizer.learning_rate": 3e-3, "batch.examples_per_step": 5}
    return [
        Record("small", tokens_per_micro_batch=BUDGET, settings=settings),
        Record("wide", tokens_per_micro_batch=BUDGET, settings=settings | other),
    ]


def make_inputs(directory: Path) -> tuple[Path, dict[str, Path]]:
    """(base, training file of each objective)."""
    directory.mkdir(parents=True, exist_ok=True)
    documents = [{"text": " ".join(turn["content"] for turn in row["messages"])} for row in chat_rows(40, seed=2)]
    rows = {"sft": chat_rows(40), "domain": documents, "dpo": pair_rows(40)}
    files = {name: write_jsonl(directory / f"{name}.jsonl", found) for name, found in rows.items()}
    return write_tiny_model(directory / "base", **SIZES), files


def run_alone(world_size: int, directory: Path) -> dict[str, list[float]]:
    base, files = make_inputs(directory / "inputs")
    of_size = [
        replace(record, settings=record.settings | {"data.train": str(files[record.name.partition("-")[0]])})
        for record in records()
        if record.world_size == world_size
    ]
    fixed = {"base_directory": str(base), "train_file": str(files["sft"])}
    return {name: found.losses for name, found in train_on_ranks(world_size, of_size, directory, **fixed).items()}


def run_fused(world_size: int, directory: Path) -> dict[str, list[float]]:
    base, files = make_inputs(directory / "inputs")
    losses = {}
    for objective in OBJECTIVES:
        fixed = {"base_directory": str(base), "train_file": str(files[objective])}
        out = directory / objective
        found = fused_on_ranks(world_size, out, records=members(objective), token_budget=BUDGET, **fixed)
        ending = f"{world_size}-rank{'s' if world_size > 1 else ''}"
        losses |= {f"{objective}-fused-{name}-{ending}": trained.losses for name, trained in found.items()}
    return losses


def machine_kind() -> str:
    """Where float32 sums come out the same to the last bit."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    facts = dict(line.replace("\t", "").split(":", 1) for line in lines if ":" in line)
    chip = " ".join(facts.get(key, "?").strip() for key in ("vendor_id", "cpu family", "model"))
    return f"{chip}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


def read_losses() -> dict[str, Any]:
    return json.loads(LOSSES.read_text())
