"""Which trials can train side by side in one process group, over one frozen base."""

from dataclasses import dataclass

from ftray.config import RunConfig, Space, SweepConfig
from ftray.config.adapter import AdapterConfig
from ftray.config.space import value_at
from ftray.objectives import objective_of

# What members of a group share, and a space must therefore leave alone.
SHARED = ("base_model", "chat", "data", "objective", "workers", "memory")

HEADS = ("lm_head", "embed_out", "output_layer")  # the output head sees trained tokens only


@dataclass(frozen=True)
class Fusing:
    """Which runs of a sweep train in groups; the others get a process group each."""

    example: RunConfig | None  # whose shared keys a group has; None: nothing is fused
    reason: str | None  # why some or all are not; None: all are
    adapters: tuple[AdapterConfig, ...] = ()  # what they may have, each once; of a range, its ends and samples

    def holds(self, run: RunConfig) -> bool:
        return self.example is not None and why_not_beside(run, self.example) is None


def fusing_of(config: SweepConfig, space: Space) -> Fusing:
    if config.search.fused == "off":
        return Fusing(None, "search.fused: off")
    runs = [space.config(point) for point in space.points_to_check(config.search)]
    example = next((run for run in runs if why_not(run) is None), None)
    if example is None:
        return Fusing(None, why_not(runs[0]))
    reasons = [why_not_beside(run, example) for run in runs]
    reason = next((reason for reason in reasons if reason is not None), None)
    if reason is not None and config.search.algorithm == "tpe":
        return Fusing(None, f"{reason}; tpe learns from all trials, so they run in the order of their numbers")
    if reason is not None and config.search.algorithm == "random" and config.search.trials is None:
        return Fusing(None, f"{reason}; a budget without a number of trials would be spent before those that run apart")
    if reason is not None and config.search.scheduler == "pbt":
        return Fusing(None, f"{reason}; the trials of a population run alike")
    fused = (run.adapter for run, reason in zip(runs, reasons, strict=True) if reason is None)
    adapters = {adapter.model_dump_json(): adapter for adapter in fused if adapter is not None}
    return Fusing(example, reason, tuple(adapters.values()))


def why_not_beside(run: RunConfig, example: RunConfig) -> str | None:
    """In one group with a run that can be fused."""
    if (reason := why_not(run)) is not None:
        return reason
    key = next((key for key in SHARED if getattr(run, key) != getattr(example, key)), None)
    return None if key is None else f"{key}: it is shared by all that are fused, and differs"


def why_not(run: RunConfig) -> str | None:
    """Of one run."""
    adapter = run.adapter
    if adapter is None:
        return "adapter: null trains the base itself"
    plain = {
        "adapter.variant": adapter.variant in ("lora", "rslora"),
        "adapter.initialization": adapter.initialization == "default",
        "adapter.quantize_base": adapter.quantize_base is None,
        "adapter.targets": adapter.targets == "all-linear" or not any(t.endswith(HEADS) for t in adapter.targets),
        "adapter.modules_to_save": not adapter.modules_to_save,
        "adapter.experts": not adapter.experts,
        "adapter.train_tokens": not adapter.train_tokens,
        "adapter.dropout": adapter.dropout == 0,  # its noise would depend on the company
        "adapter.init_from": adapter.init_from is None,
        "objective.type": objective_of(run.objective).head == "causal_lm",  # the head that a group has
        "callbacks": not run.callbacks,  # the driver of a run of its own calls them
        "optimizer.type": run.optimizer.type == "adamw",
        "zero.stage": run.zero.stage < 3,  # a sharded base under many adapters has not been tried
        "zero.offload": run.zero.offload == "none",
        "compile": run.compile is not True,
        "memory.sequence_parallel": run.memory.sequence_parallel == 1,
        "workers.count": isinstance(run.workers.count, int),
        "guard.on_bad_loss": run.guard.on_bad_loss == "stop",
    }
    odd = next((key for key, is_plain in plain.items() if not is_plain), None)
    return None if odd is None else f"{odd}: {value_at(run, odd)} cannot be fused"
