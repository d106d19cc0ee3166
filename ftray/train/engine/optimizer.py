"""AdamW over groups of parameters that differ in weight decay and learning rate."""

from typing import Any

import torch
from torch import nn

from ftray.config.run import OptimizerConfig
from ftray.train.engine.adamw_8bit import AdamW8bit

OPTIMIZERS = {"adamw": torch.optim.AdamW, "adamw_8bit": AdamW8bit}


def make_optimizer(parameters: dict[str, nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    return OPTIMIZERS[config.type](
        parameter_groups(parameters, config),
        lr=config.learning_rate,
        betas=(config.betas[0], config.betas[1]),
        eps=config.epsilon,
    )


def parameter_groups(parameters: dict[str, nn.Parameter], config: OptimizerConfig) -> list[dict[str, Any]]:
    """No decay on norms and biases, which are vectors (Loshchilov & Hutter 2019; the common practice since GPT-2).

    `rate_factor`: times the schedule's rate. LoRA+ trains B faster than A (Hayou et al. 2024, arXiv 2402.12354).
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        dimensions = len(getattr(parameter, "ds_shape", parameter.shape))
        decay = config.weight_decay if dimensions > 1 else 0.0
        factor = config.lora_plus_ratio if ".lora_B." in name else 1.0
        groups.setdefault((decay, factor), []).append(parameter)
    return [
        {"params": members, "weight_decay": decay, "rate_factor": factor}
        for (decay, factor), members in sorted(groups.items(), reverse=True)
    ]
