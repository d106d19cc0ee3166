"""`ftray plan`"""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from ftray.cli.arguments import ConfigFile, Overrides
from ftray.config import RunConfig, load_config

if TYPE_CHECKING:
    from ftray.plan.planning import Plan

GIB = 2**30


def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    gpu: Annotated[
        str, typer.Option(help="The kind of GPU, or cpu for this machine; a wrong name lists them all.")
    ] = "h100-80gb",
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
    from ftray.plan.planning import make_plan

    how = {"gpu": gpu, "count": count, "per_node": per_node, "mfu": mfu}
    made = make_plan(run, **how, examples=examples, example_tokens=example_tokens)
    if as_json:
        print(json.dumps(made.as_object() | {"gpu": gpu}, indent=2))
    else:
        show(made, per_node=per_node, mfu=mfu, price=price)
    if made.best is None:
        raise typer.Exit(1)


def show(plan: "Plan", *, per_node: int, mfu: float, price: float | None) -> None:
    run, size, best = plan.run, plan.size, plan.best
    method = "full fine-tuning" if run.adapter is None else f"LoRA of rank {run.adapter.rank}"
    print(
        f"{run.name}: {method} of {run.base_model}, {size.total / 1e9:.2f}B weights, {size.trained / 1e6:.1f}M trained"
    )
    print(f"on {plan.workers} x {plan.gpu.name}, {per_node} a node, at an assumed MFU of {mfu:.0%}; {plan.source}")
    print()
    show_table(plan, price)
    print()
    if plan.asked is None:
        print(f"the config as it is cannot run on {plan.gpu.name}: {plan.problem}")
    elif not plan.asked.fits:
        print(f"the config as it is needs {plan.asked.memory.total / GIB:.1f} GiB and does not fit")
    if best is None:
        print(
            "nothing fits: take more or larger GPUs, shorter examples (data.max_example_tokens), "
            "memory.sequence_parallel, or adapter.quantize_base"
        )
    else:
        print(f"cheapest that fits: {' '.join(best.settings)}")


def show_table(plan: "Plan", price: float | None) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("", "stage", "offload", "ckpt", "micro-batch"):
        table.add_column(name, justify="right" if name == "micro-batch" else "left")
    best = plan.best
    known = plan.num_steps is not None
    ends = ["GiB each", "host", "s/step"] + ["GPU-hours"] * known + ["cost"] * (known and price is not None)
    rows = [("as asked", plan.asked)] if plan.asked is not None else []
    rows += [("", option) for option in plan.options]
    for name in [*rows[0][1].memory.parts, *ends]:
        table.add_column(name, justify="right")
    for label, option in rows:
        config, total = option.config, plan.gpu_hours(option)
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
