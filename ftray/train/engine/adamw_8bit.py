"""AdamW whose two moments take 8 bits each: blocks of 256 share a constant, values are those of a dynamic map
(Dettmers et al. 2022, arXiv 2110.02861). The update is bitsandbytes' kernel; what is ours is the state's form.

The moments are uint8 tensors shaped like their parameter, under AdamW's own names, so that DeepSpeed cuts them as it
cuts float32 ones. For a checkpoint they become float32 for a moment: any world size and stage can read that. The
constants are kept beside it, so that the same world size and stage goes on with exactly the same state.
"""

import contextlib
import importlib.util
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ftray.errors import FtrayError, UserError
from ftray.train.engine.state import MOMENTS

BLOCK = 256


class AdamW8bit(torch.optim.Optimizer):
    def __init__(self, groups: Iterable[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float):
        if importlib.util.find_spec("bitsandbytes") is None:
            raise UserError("optimizer.type: adamw_8bit needs bitsandbytes: pip install 'ftray[quantized]'")
        from bitsandbytes.functional import create_dynamic_map

        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._maps = {key: create_dynamic_map(signed=key == "exp_avg") for key in MOMENTS}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        from bitsandbytes.functional import optimizer_update_8bit_blockwise

        for group in self.param_groups:
            for parameter in (p for p in group["params"] if p.grad is not None):
                state = self.state[parameter]
                if not state:
                    state |= self._empty_state(parameter)
                state["step"] += 1
                mean, square = MOMENTS
                optimizer_update_8bit_blockwise(
                    "adam",
                    parameter.grad.contiguous(),
                    parameter,
                    state1=state[mean],
                    state2=state[square],
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    beta3=0.0,  # this and alpha: of another optimizer
                    alpha=0.0,
                    eps=group["eps"],
                    step=int(state["step"]),
                    lr=group["lr"],
                    qmap1=self._maps[mean].to(parameter.device),
                    qmap2=self._maps[square].to(parameter.device),
                    absmax1=state[f"{mean}.blocks"],
                    absmax2=state[f"{square}.blocks"],
                    weight_decay=group["weight_decay"],
                )

    @contextlib.contextmanager
    def float_moments(self) -> Iterator[None]:
        """While it is open the moments are float32 copies on the CPU."""
        kept = {flat: dict(state) for flat, state in self.state.items()}
        for flat, state in self.state.items():
            for key in MOMENTS:
                self.state[flat][key] = dequantize(state[key], state[f"{key}.blocks"], self._maps[key])
        try:
            yield
        finally:
            for flat, state in kept.items():
                self.state[flat] |= state

    def blocks(self) -> dict[str, Tensor]:
        """The blocks' constants, by place of the tensor and moment: together with `float_moments` the exact state."""
        return {
            f"{place}.{key}": state[f"{key}.blocks"].to("cpu", copy=True)
            for place, state in enumerate(self.state.values())
            for key in MOMENTS
        }

    def quantize_moments(self, blocks: dict[str, Tensor]) -> None:
        """Float32 moments, as a checkpoint fills them in, become 8-bit ones. `blocks`: of the same layout, or empty."""
        for place, (flat, state) in enumerate(self.state.items()):
            for key in MOMENTS:
                given = blocks.get(f"{place}.{key}")
                if given is not None and len(given) != -(-flat.numel() // BLOCK):
                    raise FtrayError(
                        f"the checkpoint has {len(given)} blocks of 8-bit moments for {flat.numel()} weights"
                    )
                codes, constants = quantize(state[key], self._maps[key], given)
                state |= {key: codes.to(flat.device), f"{key}.blocks": constants.to(flat.device)}

    def _empty_state(self, parameter: nn.Parameter) -> dict[str, Any]:
        num_blocks = -(-parameter.numel() // BLOCK)
        state: dict[str, Any] = {"step": torch.tensor(0.0)}
        for key in MOMENTS:
            state[key] = torch.zeros_like(parameter, dtype=torch.uint8)
            state[f"{key}.blocks"] = torch.zeros(num_blocks, device=parameter.device)
        return state


def dequantize(codes: Tensor, blocks: Tensor, code_map: Tensor) -> Tensor:
    """float32 on the CPU, in the shape of `codes`."""
    flat = codes.detach().to("cpu").flatten()
    constants = blocks.to("cpu").repeat_interleave(BLOCK)[: len(flat)]
    return (code_map.to("cpu")[flat.int()] * constants).view(codes.shape)


def quantize(values: Tensor, code_map: Tensor, blocks: Tensor | None) -> tuple[Tensor, Tensor]:
    """(uint8 codes in the shape of `values`, constants of the blocks), on the CPU. With the constants that made
    `values`, exactly the codes that made them."""
    flat = values.detach().to("cpu", torch.float32).flatten()
    if blocks is None:
        padded = nn.functional.pad(flat, (0, -len(flat) % BLOCK))
        blocks = padded.view(-1, BLOCK).abs().amax(1)
    constants = blocks.repeat_interleave(BLOCK)[: len(flat)]
    scaled = torch.where(constants > 0, flat / constants, torch.zeros(()))
    code_map = code_map.to("cpu")
    codes = torch.bucketize(scaled, (code_map[1:] + code_map[:-1]) / 2).to(torch.uint8)
    return codes.view(values.shape), blocks
