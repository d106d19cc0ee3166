"""`ftray plan`"""

import json
from typing import Annotated

import typer

from ftray.cli.arguments import ConfigFile, Overrides
from ftray.config import RunConfig, load_config
from ftray.errors import UserError

GIB = 2**30


def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    gpu: Annotated[str, typer.Option(help="The kind of GPU; a wrong name lists them all.")] = "h100-80gb",
    count: Annotated[int | None, typer.Option(min=1, help="How many; without it workers.count of the config.")] = None,
    per_node: Annotated[int, typer.Option(min=1, help="GPUs of one host: they have the fast links.")] = 8,
    examples: Annotated[int | None, typer.Option(min=1, help="Rows of data.train, where the file is not here.")] = None,
    example_tokens: Annotated[
        int | None, typer.Option(min=1, help="Mean tokens of an example; without it half of data.max_example_tokens.")
    ] = None,
    mfu: Annotated[float, typer.Option(min=0.01, max=1.0, help="Share of the GPU's rate that is reached.")] = 0.4,
    price: Annotated[float | None, typer.Option(min=0, help="Of one GPU for an hour.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Memory, time and cost of a run, by setting, before a GPU is touched."""
    run: RunConfig = load_config(config, overrides or (), kind="run")
    from ftray.model.base import check_base_name
    from ftray.plan.gpus import find_gpu
    from ftray.plan.model_size import measure_model, read_model_config
    from ftray.plan.options import Option, cheapest, options, plan_option

    chip = find_gpu(gpu)
    workers = count or run.workers.max_count
    check_base_name(run.base_model)
    check_can_run(run, workers, chip)
    size = measure_model(read_model_config(run.base_model), run.adapter, dtype=chip.dtype)
    work, steps, source = find_work(run, examples, example_tokens)
    fixed = {"workers": workers, "per_node": per_node, "mfu": mfu}
    asked = plan_option(run, size, chip, work, **fixed)
    found = options(run, size, chip, work, **fixed)
    best = cheapest(found)

    def hours(option: Option) -> float | None:
        return None if steps is None else option.step_s * steps * workers / 3600

    if as_json:
        print(
            json.dumps(
                {
                    "model": vars(size) | {"flops": vars(size.flops)},
                    "gpu": gpu,
                    "workers": workers,
                    "steps": steps,
                    "asked": as_object(asked, hours(asked)),
                    "options": [as_object(option, hours(option)) for option in found],
                    "cheapest": best.settings if best is not None else None,
                },
                indent=2,
            )
        )
        if best is None:
            raise typer.Exit(1)
        return
    method = "full fine-tuning" if run.adapter is None else f"LoRA of rank {run.adapter.rank}"
    print(
        f"{run.name}: {method} of {run.base_model}, {size.total / 1e9:.2f}B weights, {size.trained / 1e6:.1f}M trained"
    )
    print(f"on {workers} x {chip.name}, {per_node} a node, at an assumed MFU of {mfu:.0%}; {source}")
    print()
    show_table([("as asked", asked)] + [("", option) for option in found], best, hours, price)
    print()
    if not asked.fits:
        print(f"the config as it is needs {asked.memory.total / GIB:.1f} GiB and does not fit")
    if best is None:
        print(
            "nothing fits: take more or larger GPUs, shorter examples (data.max_example_tokens), "
            "memory.sequence_parallel, or adapter.quantize_base"
        )
        raise typer.Exit(1)
    print(f"cheapest that fits: {' '.join(best.settings)}")


def check_can_run(run: RunConfig, workers: int, chip) -> None:
    """What the workers would refuse."""
    from ftray.model.hardware import check_stage

    if workers % run.memory.sequence_parallel:
        raise UserError(
            f"--count: memory.sequence_parallel {run.memory.sequence_parallel} does not divide {workers} GPUs"
        )
    check_stage(run.zero.stage, chip.dtype)


def find_work(run: RunConfig, examples: int | None, example_tokens: int | None):
    """(work of a step, number of steps or None, where the numbers are from)"""
    from pathlib import Path

    from ftray.model.base import EMBEDDED
    from ftray.plan.options import Work

    share = 1.0
    source = f"examples of {example_tokens} tokens"
    here = run.base_model in EMBEDDED or Path(run.base_model).exists()  # else its tokenizer comes with all its weights
    if example_tokens is None and here and Path(run.data.train).is_file():
        from ftray.train.launch import prepare_data

        _, data = prepare_data(run, lambda text: None)
        counts = data.train.counts()
        examples = examples or counts["examples"]
        example_tokens = counts["tokens"] // counts["examples"]
        share = counts["trained_tokens"] / counts["tokens"]
        source = f"{counts['examples']:,} examples of {example_tokens} tokens on average, as data.train has them"
    elif example_tokens is None:
        example_tokens = run.longest_example // 2
        source = f"examples of {example_tokens} tokens assumed (--example-tokens)"
    steps = run.max_steps
    if run.epochs is not None and examples is not None:
        steps = -(-run.epochs * examples // run.batch.examples_per_step)
    from ftray.objectives import objective_of

    sequences = objective_of(run.objective).sequences_per_example
    return Work(run.batch.examples_per_step, float(example_tokens), share, sequences), steps, source


def show_table(rows, best, hours, price: float | None) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("", "stage", "offload", "ckpt", "micro-batch"):
        table.add_column(name, justify="right" if name == "micro-batch" else "left")
    parts = list(rows[0][1].memory.parts)
    known = hours(rows[0][1]) is not None
    ends = ["GiB each", "host", "s/step"] + ["GPU-hours"] * known + ["cost"] * (known and price is not None)
    for name in [*parts, *ends]:
        table.add_column(name, justify="right")
    for label, option in rows:
        config, total = option.config, hours(option)
        cells = [
            "cheapest" if option is best else label,
            str(config.zero.stage),
            config.zero.offload,
            "yes" if config.memory.activation_checkpointing else "no",
            f"{config.batch.tokens_per_micro_batch:,}",
            *(f"{value / GIB:.1f}" for value in option.memory.parts.values()),
            f"{option.memory.total / GIB:.1f}" + ("" if option.fits else " too much"),
            f"{option.memory.host / GIB:.1f}" if option.memory.host else "",
            f"{option.step_s:.2f}" if option.fits else "-",
        ]
        if total is not None:
            cells.append(f"{total:,.1f}" if option.fits else "-")
            if price is not None:
                cells.append(f"{total * price:,.0f}" if option.fits else "-")
        table.add_row(*cells, style=None if option.fits else "dim")
    Console(width=170, soft_wrap=True).print(table)


def as_object(option, gpu_hours: float | None) -> dict:
    return {
        "settings": option.settings,
        "memory_gib": {name: round(value / GIB, 3) for name, value in vars(option.memory).items()},
        "total_gib": round(option.memory.total / GIB, 3),
        "fits": option.fits,
        "step_s": round(option.step_s, 4),
        "gpu_hours": gpu_hours,
    }
