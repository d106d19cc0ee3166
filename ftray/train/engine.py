"""The DeepSpeed engine behind five verbs. The loop above it knows steps and rows, not ranks and stages."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ftray.config.run import OptimizerConfig
from ftray.errors import FtrayError
from ftray.model.hardware import Hardware
from ftray.model.packed import PackedCausalLM, PackedRow
from ftray.objectives import Loss, Objective
from ftray.train.sharded import Shard, ShardedState
from ftray.train.zero import (
    full_parameter,
    full_shape,
    link_moments,
    local_fragment,
    restore_state,
    skip_unused_builds,
    zero_settings,
)


class TrainEngine:
    def __init__(
        self,
        model: PackedCausalLM,
        objective: Objective,
        hardware: Hardware,
        config: OptimizerConfig,
        *,
        stage: int,
        sharding: Any = None,  # what `shard_while_loading` returned: it must live as long as the model
    ):
        self._sharding = sharding
        self.model = model
        self.objective = objective
        self.hardware = hardware
        self.stage = stage
        self.max_grad_norm = config.max_grad_norm
        self.trainable = {name: p for name, p in model.model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(
            decay_groups(self.trainable, config.weight_decay),
            lr=config.learning_rate,
            betas=(config.betas[0], config.betas[1]),
            eps=config.epsilon,
        )
        num_trainable = sum(getattr(p, "ds_numel", p.numel()) for p in self.trainable.values())
        settings = zero_settings(stage, hardware, max_grad_norm=config.max_grad_norm, num_trainable=num_trainable)
        self._grad_norm: float | None = None
        self.micro_batch_losses: list[float] = []  # means of the last step's, on this rank
        if stage == 0:
            optimizer.register_step_pre_hook(self._clip_reduced_gradients)
        skip_unused_builds()
        self._engine: Any
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)

    @property
    def world_size(self) -> int:
        return dist.get_world_size()

    def forward_backward(self, rows: Iterable[PackedRow], *, denominator: int) -> float:
        """Accumulates the gradient of (sum of losses over all ranks) / denominator; returns that loss."""
        self._engine.train()
        losses: list[Tensor] = []  # (sum, count) each: read once at the end, so that a GPU is not waited for
        for row in rows:
            loss = self._loss(row)
            # DeepSpeed averages gradients over the ranks; we want their sum.
            self._engine.backward(loss.sum * (self.world_size / denominator), scale_wrt_gas=False)
            losses.append(torch.stack([loss.sum.detach().double(), loss.count.double()]))
        pairs = torch.stack(losses).tolist()
        self.micro_batch_losses = [total / max(1.0, count) for total, count in pairs]
        return self.sum_over_ranks(sum(total for total, _ in pairs)) / denominator

    def optim_step(self, *, lr: float) -> float:
        """One AdamW update; returns the norm of the whole gradient before clipping."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        norm = self._grad_norm if self.stage == 0 else self._engine.get_global_grad_norm()
        if norm is None:
            raise FtrayError(f"zero.stage {self.stage}: DeepSpeed reported no gradient norm")
        return float(norm)

    @torch.no_grad()
    def evaluate(self, rows: Iterable[PackedRow]) -> float:
        """Mean loss per trained token over all ranks."""
        self._engine.eval()
        total = count = 0.0
        for row in rows:
            loss = self._loss(row)
            total += loss.sum.item()
            count += loss.count.item()
        return self.sum_over_ranks(total) / self.sum_over_ranks(count)

    def sum_over_ranks(self, value: float) -> float:
        tensor = torch.tensor(value, dtype=torch.float64, device=self.hardware.device)
        dist.all_reduce(tensor)
        return tensor.item()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every trained parameter, whole and in float32, one at a time. All ranks must go through it."""
        for name, parameter in self.trainable.items():
            yield name, full_parameter(parameter)

    def shard(self) -> Shard:
        """This rank's share of weights and moments, copied to the CPU. No communication."""
        link_moments(self._engine)
        shard = Shard({}, {}, {})
        for name, parameter in self.trainable.items():
            fragment = local_fragment(self._engine, parameter)
            if fragment is not None:
                shard.starts[name] = fragment.start
                shard.shapes[name] = list(full_shape(parameter))
                for kind, value in fragment.tensors.items():
                    shard.tensors[f"{kind}.{name}"] = value.detach().to("cpu", torch.float32, copy=True)
        return shard

    def restore(self, saved: ShardedState, *, step: int) -> None:
        """Master weights and moments as the shards of any world size and stage hold them."""
        restore_state(self._engine, self.trainable, saved, step=step)

    def all_ranks(self, condition: bool) -> bool:
        return self.sum_over_ranks(float(condition)) == self.world_size

    def gather(self, value: Any) -> list[Any]:
        """A small object of every rank, in order of rank, on every rank."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def close(self) -> None:
        """Frees DeepSpeed's hooks and buffers, where a process makes one engine after another."""
        self._engine.destroy()
        self._sharding = None

    def _loss(self, row: PackedRow) -> Loss:
        row = row.to(self.hardware.device)
        return self.objective(self._engine(row), row.weights_N)

    def _clip_reduced_gradients(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._grad_norm = float(nn.utils.clip_grad_norm_(list(self.trainable.values()), self.max_grad_norm))


def decay_groups(parameters: dict[str, nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """No decay on norms and biases, which are vectors (Loshchilov & Hutter 2019; the common practice since GPT-2)."""
    dimensions = {name: len(getattr(p, "ds_shape", p.shape)) for name, p in parameters.items()}
    groups: Sequence[tuple[float, list[nn.Parameter]]] = [
        (weight_decay, [p for name, p in parameters.items() if dimensions[name] > 1]),
        (0.0, [p for name, p in parameters.items() if dimensions[name] <= 1]),
    ]
    return [{"params": members, "weight_decay": decay} for decay, members in groups if members]
