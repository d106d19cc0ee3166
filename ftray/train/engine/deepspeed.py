"""The engine over DeepSpeed. The loop above it knows steps and rows, not ranks and stages."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ftray.config import RunConfig
from ftray.errors import FtrayError
from ftray.model.adapters.lora import options_of, without_adapter
from ftray.model.flops import count_flops, measure_gemm_rate
from ftray.model.hardware import Hardware
from ftray.model.packed import PackedCausalLM, PackedRow
from ftray.objectives import LogProbs, Loss, LossFunction, Objective
from ftray.train.engine.adamw_8bit import AdamW8bit
from ftray.train.engine.optimizer import make_optimizer
from ftray.train.engine.protocol import StepLoss, sums_of
from ftray.train.engine.state import Shard, ShardedState
from ftray.train.engine.zero import (
    freeze,
    full_parameter,
    full_shape,
    link_moments,
    local_fragment,
    restore_state,
    zero_settings,
)
from ftray.train.step_record import FlopsMeter


class DeepSpeedEngine:
    """`TrainingEngine` over DeepSpeed ZeRO."""

    def __init__(
        self,
        model: PackedCausalLM,
        objective: Objective,
        loss: LossFunction,
        hardware: Hardware,
        config: RunConfig,
        *,
        sharding: Any = None,  # what `shard_while_loading` returned: it must live as long as the model
        reference: PackedCausalLM | None = None,  # for an objective that needs one, when all weights are trained
        initial_adapter: dict[str, Tensor] | None = None,  # what `inject_lora` returned
    ):
        self._sharding = sharding
        self.model = model
        self.objective = objective
        self.loss = loss
        self.hardware = hardware
        self.stage = config.zero.stage
        self._zero_settings = config.zero.settings
        self.max_grad_norm = config.optimizer.max_grad_norm
        self.initial_adapter = initial_adapter
        self.sequence_parallel = model.ranks.size if model.ranks is not None else 1
        self.trainable = {name: p for name, p in model.model.named_parameters() if p.requires_grad}
        optimizer = make_optimizer(self.trainable, config.optimizer)
        num_trainable = sum(getattr(p, "ds_numel", p.numel()) for p in self.trainable.values())
        settings = zero_settings(config.zero, hardware, max_grad_norm=self.max_grad_norm, num_trainable=num_trainable)
        self._grad_norm: float | None = None
        self.micro_batch_losses: list[float] = []  # means of the last step's, on this rank
        if self.stage == 0:
            optimizer.register_step_pre_hook(self._clip_reduced_gradients)
        self._engine: Any
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        self._reference_model = freeze(reference, settings, stage=self.stage) if reference is not None else None
        self.ties_embeddings = bool(getattr(model.model.config.get_text_config(), "tie_word_embeddings", False))
        self.adapter_options = options_of(model.model)
        dist.barrier()  # all at once, as they will train: on one machine they share its cores
        self.meter = FlopsMeter(
            count_flops(model.model, model.head),
            self.sum_over_ranks(measure_gemm_rate(hardware)),
            trains_base=config.adapter is None,
            reference=objective.needs_reference,
        )

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        return dist.get_world_size()

    @property
    def num_shares(self) -> int:
        return self.world_size // self.sequence_parallel

    @property
    def share(self) -> int:
        return dist.get_rank() // self.sequence_parallel

    def forward_backward(self, rows: Iterable[PackedRow], *, denominator: int) -> StepLoss:
        self._engine.train()
        denominator *= self.sequence_parallel  # each rank of a share counts its loss
        sums: list[Tensor] = []  # (sum, count, metrics) each: read once at the end, so that a GPU is not waited for
        names: list[str] = []
        for row in rows:
            loss = self._loss(row)
            # DeepSpeed averages gradients over the ranks; we want their sum.
            self._engine.backward(loss.sum * (self.world_size / denominator), scale_wrt_gas=False)
            sums.append(sums_of(loss))
            names = list(loss.metrics)
        by_row = torch.stack(sums)
        self.micro_batch_losses = (by_row[:, 0] / by_row[:, 1].clamp(min=1)).tolist()
        total = by_row.sum(0)
        dist.all_reduce(total)
        loss, _, *metrics = (total / denominator).tolist()
        return StepLoss(loss, dict(zip(names, metrics, strict=True)))

    def optim_step(self, *, lr: float) -> float:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr * group["rate_factor"]
        self._engine.step()
        norm = self._grad_norm if self.stage == 0 else self._engine.get_global_grad_norm()
        if norm is None:
            raise FtrayError(f"zero.stage {self.stage}: DeepSpeed reported no gradient norm")
        return float(norm)

    @torch.no_grad()
    def evaluate(self, rows: Iterable[PackedRow]) -> StepLoss:
        self._engine.eval()
        sums: list[Tensor] = []  # (sum, count, metrics)
        names: list[str] = []
        for row in rows:
            loss = self._loss(row)
            sums.append(sums_of(loss))
            names = list(loss.metrics)
        total = torch.stack(sums).sum(0)
        dist.all_reduce(total)
        loss, *metrics = (torch.cat([total[:1], total[2:]]) / total[1]).tolist()
        return StepLoss(loss, dict(zip(names, metrics, strict=True)))

    @torch.no_grad()
    def next_tokens(self, row: PackedRow) -> list[int]:
        self._engine.eval()
        return self._engine(row.to(self.hardware.device), predict=True).tolist()

    def sum_over_ranks(self, value: float) -> float:
        tensor = torch.tensor(value, dtype=torch.float64, device=self.hardware.device)
        dist.all_reduce(tensor)
        return tensor.item()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.trainable.items():
            yield name, full_parameter(parameter)

    def shard(self) -> Shard:
        optimizer = self._engine.basic_optimizer
        compressed = isinstance(optimizer, AdamW8bit)
        shard = Shard({}, {}, {}, optimizer.blocks() if compressed else {}, self._layout if compressed else "")
        with optimizer.float_moments() if compressed else contextlib.nullcontext():
            link_moments(self._engine)
            for name, parameter in self.trainable.items():
                fragment = local_fragment(self._engine, parameter)
                if fragment is not None:
                    shard.starts[name] = fragment.start
                    shard.shapes[name] = list(full_shape(parameter))
                    for kind, value in fragment.tensors.items():
                        shard.tensors[f"{kind}.{name}"] = value.detach().to("cpu", torch.float32, copy=True)
        link_moments(self._engine)
        return shard

    @property
    def _layout(self) -> str:
        """What decides which elements lie in which block of this rank's 8-bit moments."""
        sizes = [flat.numel() for flat in self._engine.basic_optimizer.state]
        where = f"{self.world_size} workers, stage {self.stage}, rank {dist.get_rank()}"
        return f"{where}, {self._zero_settings}, {sizes}"

    def restore(self, saved: ShardedState, *, step: int) -> None:
        restore_state(self._engine, self.trainable, saved, step=step)
        if isinstance(self._engine.basic_optimizer, AdamW8bit):
            self._engine.basic_optimizer.quantize_moments(saved.blocks(self._layout))
            link_moments(self._engine)

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def close(self) -> None:
        """Frees DeepSpeed's hooks and buffers, where a process makes one engine after another."""
        self._engine.destroy()
        self._sharding = None

    def _loss(self, row: PackedRow) -> Loss:
        row = row.to(self.hardware.device)
        reference_N = self._reference(row) if self.objective.needs_reference else None
        return self.loss(LogProbs(self._engine(row), reference_N), row)

    @torch.no_grad()
    def _reference(self, row: PackedRow) -> Tensor:
        """Under the frozen reference: the base with the adapter off, or, where all weights are trained, a copy."""
        if self._reference_model is not None:
            return self._reference_model(row)
        with without_adapter(self.model):
            return self._engine(row)

    def _clip_reduced_gradients(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._grad_norm = float(nn.utils.clip_grad_norm_(list(self.trainable.values()), self.max_grad_norm))
