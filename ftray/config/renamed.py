"""Keys and values of a run that have another name since a release. The old one is read for one release more; a file
that has it gets a line that says so, and runs that began with it go on."""

from typing import Any

KEYS = {"memory.compile": "compile"}
VALUES = {"objective.type": {"domain": "text"}}
UNTIL = "0.3"


class RenamedWarning(FutureWarning):
    pass


def with_new_names(tree: Any) -> Any:
    """A copy of a run's tree of sections; what is no such tree comes back as it is. Raises ValueError where it has both
    names: neither is dropped for the other."""
    if not isinstance(tree, dict):
        return tree
    tree = {key: dict(value) if isinstance(value, dict) else value for key, value in tree.items()}
    for old, new in KEYS.items():
        section, key = old.split(".")
        if isinstance(tree.get(section), dict) and key in tree[section]:
            if new in tree:
                raise ValueError(f"{old} is called {new} now, and both are given; leave {old} out")
            tree[new] = tree[section].pop(key)
    for path, names in VALUES.items():
        section, key = path.split(".")
        if isinstance(tree.get(section), dict) and isinstance(value := tree[section].get(key), str):
            tree[section][key] = names.get(value, value)
    return tree


def by_new_keys(settings: Any) -> Any:
    """Of a sweep's `space`: settings by the dotted key."""
    return {KEYS.get(key, key): value for key, value in settings.items()} if isinstance(settings, dict) else settings


def old_names(tree: dict[str, Any]) -> list[str]:
    """A line for each that a run's file, or settings by their dotted keys, still have."""

    def found(path: str) -> Any:
        section, key = path.split(".")
        return tree[section].get(key) if isinstance(tree.get(section), dict) else None

    lines = [f"{old} is called {new} now" for old, new in KEYS.items() if found(old) is not None or old in tree]
    for path, names in VALUES.items():
        lines += [f"{path}: {old} is called {new} now" for old, new in names.items() if found(path) == old]
    return [f"{line}; the old name is read until ftray {UNTIL}" for line in lines]


# Keys as other tools have them (transformers and TRL, LLaMA-Factory, Axolotl, Unsloth), and what they are here.
HERE = {
    "lr": "optimizer.learning_rate",
    "learning_rate": "optimizer.learning_rate",
    "weight_decay": "optimizer.weight_decay",
    "max_grad_norm": "optimizer.max_grad_norm",
    "lr_scheduler": "optimizer.schedule",
    "lr_scheduler_type": "optimizer.schedule",
    "warmup_steps": "optimizer.warmup_steps",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "model": "base_model",
    "model_name": "base_model",
    "model_name_or_path": "base_model",
    "output_dir": "runs_dir, and name",
    "run_name": "name",
    "dataset": "data.train",
    "datasets": "data.train",
    "dataset_name": "data.train",
    "train_file": "data.train",
    "eval_file": "data.eval",
    "cutoff_len": "data.max_example_tokens",
    "sequence_len": "data.max_example_tokens",
    "max_length": "data.max_example_tokens",
    "max_seq_length": "data.max_example_tokens",
    "micro_batch_size": "batch.tokens_per_micro_batch (in tokens, padding-free)",
    "per_device_train_batch_size": "batch.examples_per_step (of all workers together) and batch.tokens_per_micro_batch",
    "batch_size": "batch.examples_per_step (of all workers together)",
    "gradient_accumulation_steps": "batch.examples_per_step: how many micro-batches make a step follows from it",
    "gradient_checkpointing": "memory.activation_checkpointing",
    "lora_r": "adapter.rank",
    "lora_rank": "adapter.rank",
    "r": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "lora_target": "adapter.targets",
    "lora_target_modules": "adapter.targets",
    "target_modules": "adapter.targets",
    "use_dora": "adapter.variant=dora",
    "use_rslora": "adapter.variant=rslora",
    "finetuning_type": "adapter (null: all weights)",
    "load_in_4bit": "adapter.quantize_base",
    "load_in_8bit": "adapter.quantize_base",
    "quantization_bit": "adapter.quantize_base",
    "deepspeed": "zero.stage and zero.offload",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "eval_steps": "evaluation.every",
    "report_to": "tracking.wandb and tracking.tensorboard",
    "resume_from_checkpoint": "nothing: the same command goes on from the last checkpoint",
    "packing": "nothing: rows are always packed, and never see each other",
    "sample_packing": "nothing: rows are always packed, and never see each other",
    "bf16": "nothing: the hardware decides (bfloat16 where it has it, else float32)",
    "fp16": "nothing: the hardware decides (bfloat16 where it has it, else float32)",
    "dtype": "nothing: the hardware decides (bfloat16 where it has it, else float32)",
    "torch_dtype": "nothing: the hardware decides (bfloat16 where it has it, else float32)",
    "val_size": "data.eval: a fraction, such as 0.05",
    "val_set_size": "data.eval: a fraction, such as 0.05",
    "eval_fraction": "data.eval: a fraction, such as 0.05",
}


def of_other_tools(key: str) -> str | None:
    return f"what other tools call so is here {HERE[key]}" if key in HERE else None
