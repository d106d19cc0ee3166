"""Settings that are allowed and known to hurt: told once, with the reason and where it is from."""

from collections.abc import Iterator

from ftray.config.run import RunConfig
from ftray.objectives import objective_of

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "query_key_value", "c_attn", "out_proj")
LORA_BATCH = 32  # examples a step
LORA_RATE = 5e-5  # below it lies what full fine-tuning uses


def advise(run: RunConfig) -> list[str]:
    return list(advice(run))


def advice(run: RunConfig) -> Iterator[str]:
    adapter, rate = run.adapter, run.optimizer.learning_rate
    if adapter is None:
        if rate > 1e-4:
            yield f"optimizer.learning_rate: {rate:g} is a rate for LoRA; full fine-tuning mostly uses 1e-6 to 5e-5"
        return
    if isinstance(adapter.targets, list) and all(target in ATTENTION for target in adapter.targets):
        yield (
            "adapter.targets: attention alone trains worse than all linear layers at the same number of parameters "
            "(Schulman et al. 2025, LoRA Without Regret; Biderman et al. 2024, arXiv 2405.09673)"
        )
    if run.batch.examples_per_step > LORA_BATCH and objective_of(run.objective).shape == "conversation":
        yield (
            f"batch.examples_per_step: {run.batch.examples_per_step}; large batches cost LoRA more than full "
            f"fine-tuning, {LORA_BATCH} and fewer are safe (Schulman et al. 2025, LoRA Without Regret)"
        )
    if rate < LORA_RATE and not objective_of(run.objective).needs_reference:
        yield (
            f"optimizer.learning_rate: {rate:g} is a rate for full fine-tuning; LoRA wants about 10 times more "
            "(Schulman et al. 2025, LoRA Without Regret)"
        )
    if adapter.dropout > 0 and run.workers.max_count > 1:
        yield "adapter.dropout: its noise depends on the number of workers; losses agree across worker counts only at 0"
