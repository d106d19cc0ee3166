"""Which trials can train side by side in one process group, over one frozen base."""

from typing import Any

from ftray.config import RunConfig, Space, SweepConfig
from ftray.config.space import value_at

# What members of a group share, and a space must therefore leave alone.
SHARED = ("base_model", "data", "objective", "workers", "memory")


def why_not_fused(config: SweepConfig, space: Space) -> str | None:
    """The first key that stands against it; None: all points can be fused."""
    shared: dict[str, Any] | None = None
    for point in space.points_to_check(is_grid=config.search.algorithm == "grid"):
        run = space.config(point)
        if (reason := why_not(run)) is not None:
            return reason
        own = run.model_dump(include=set(SHARED))
        if shared is None:
            shared = own
        differing = [key for key in SHARED if own[key] != shared[key]]
        if differing:
            return f"the space changes {differing[0]}, which one group has in common"
    return None


def why_not_beside(config: SweepConfig, space: Space, point: dict[str, Any]) -> str | None:
    """Of a point that the user adds to a sweep; None also where the sweep's trials are not fused anyway."""
    if config.search.fused == "off" or why_not_fused(config, space) is not None:
        return None
    own, others = space.config(point), space.config(next(iter(space.points_to_check(is_grid=False))))
    if (reason := why_not(own)) is not None:
        return reason
    differing = [key for key in SHARED if getattr(own, key) != getattr(others, key)]
    return f"{differing[0]}: it is shared by all that are fused" if differing else None


def why_not(run: RunConfig) -> str | None:
    """Of one run."""
    adapter = run.adapter
    if adapter is None:
        return "adapter: null trains the base itself"
    plain = {
        "adapter.variant": adapter.variant in ("lora", "rslora"),
        "adapter.initialization": adapter.initialization == "default",
        "adapter.quantize_base": adapter.quantize_base is None,
        "adapter.modules_to_save": not adapter.modules_to_save,
        "adapter.dropout": adapter.dropout == 0,  # its noise would depend on the company
        "adapter.init_from": adapter.init_from is None,
        "optimizer.type": run.optimizer.type == "adamw",
        "zero.stage": run.zero.stage < 3,  # a sharded base under many adapters has not been tried
        "zero.offload": run.zero.offload == "none",
        "memory.compile": run.memory.compile is not True,
        "memory.sequence_parallel": run.memory.sequence_parallel == 1,
        "workers.count": isinstance(run.workers.count, int),
        "evaluation.samples": run.evaluation.samples == 0,
        "tracking.wandb": run.tracking.wandb == "off",  # one run a process
        "guard.on_bad_loss": run.guard.on_bad_loss == "stop",
    }
    odd = next((key for key, is_plain in plain.items() if not is_plain), None)
    return None if odd is None else f"{odd}: {value_at(run, odd)} cannot be fused"
