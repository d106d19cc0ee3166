"""The decoder layers of one engine step, with few operations: on a CPU an operation costs more than it computes when
one token is decoded.

`LlamaStack` computes the Llama family (pre-normed layers, rotary positions, gated SiLU; biases and normed heads where
the weights have them) from the model's own modules. Any other architecture goes through transformers' forward, with
our attention in it (`TransformersStack`).

Shapes: T tokens in the row, E hidden, H query heads, K key/value heads, D head dimension.
"""

import itertools
from typing import Any, Protocol

import torch
from torch import Tensor

from ftray.infer.torch_engine.attention import AttentionStep, attend, write_kv
from ftray.infer.torch_engine.cpu.frozen_linear import FrozenLinear, Projection
from ftray.infer.torch_engine.cpu.kernels import CpuKernels, RmsNorm, kernels_for

LLAMA_LIKE = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}


class Stack(Protocol):
    def __call__(self, ids_T: Tensor, positions_T: Tensor, step: AttentionStep) -> Tensor:
        """Hidden states [T, E] after the last norm."""
        ...


def make_stack(decoder: Any, head: FrozenLinear) -> Stack:
    """Of a model whose linear layers are `Projection`s, and of what computes its logits."""
    kinds = {type(layer).__name__ for layer in getattr(decoder, "layers", ())}
    if not kinds or not kinds <= LLAMA_LIKE or decoder.config.hidden_act != "silu":
        return TransformersStack(decoder)
    whole_heads = 2 * decoder.rotary_emb.inv_freq.numel() == decoder.layers[0].self_attn.head_dim
    return LlamaStack(decoder, head) if whole_heads else TransformersStack(decoder)


class TransformersStack:
    def __init__(self, decoder: Any):
        self._decoder = decoder

    def __call__(self, ids_T: Tensor, positions_T: Tensor, step: AttentionStep) -> Tensor:
        return self._decoder(
            input_ids=ids_T[None], position_ids=positions_T[None], use_cache=False, step=step
        ).last_hidden_state[0]


class LlamaStack:
    def __init__(self, decoder: Any, head: FrozenLinear):
        self._embed = decoder.embed_tokens
        self._rotary = decoder.rotary_emb
        self._kernels = kernels_for(decoder.embed_tokens.weight)
        self._layers = [LlamaLayer(layer, self._kernels) for layer in decoder.layers]
        self._norm = norm_of(decoder.norm)
        if self._kernels is not None:
            in_turn = [group for layer in self._layers for group in layer.groups]
            for group, following in itertools.pairwise(in_turn):
                group.comes_before(following)
            in_turn[-1].layers.following = head.layers

    def __call__(self, ids_T: Tensor, positions_T: Tensor, step: AttentionStep) -> Tensor:
        hidden_TE = self._embed(ids_T)
        cos, sin = self._rotary(hidden_TE, positions_T[None])  # [1, T, D], the two halves of D alike
        half = sin.shape[-1] // 2
        cos_TD, sin_TD = cos[0].contiguous(), sin[0].clone()
        sin_TD[:, :half].neg_()  # so that swapping the halves is the rotation
        for layer in self._layers:
            hidden_TE = layer(hidden_TE, cos_TD, sin_TD, step)
        return self._norm(hidden_TE) if self._kernels is None else self._kernels.rms_norm(hidden_TE, self._norm)


class LlamaLayer:
    def __init__(self, layer: Any, kernels: CpuKernels | None):
        self._kernels = kernels
        attention, mlp = layer.self_attn, layer.mlp
        self._index: int = attention.layer_idx
        self._scaling: float = attention.scaling
        self._head_dim: int = attention.head_dim
        self._qkv, self._gate_up = group_of(attention.q_proj), group_of(mlp.gate_proj)
        self._out, self._down = group_of(attention.o_proj), group_of(mlp.down_proj)
        self.groups = self._qkv, self._out, self._gate_up, self._down
        self._norm_in, self._norm_mlp = norm_of(layer.input_layernorm), norm_of(layer.post_attention_layernorm)
        self._norm_q = norm_of(attention.q_norm) if hasattr(attention, "q_norm") else None
        self._norm_k = norm_of(attention.k_norm) if hasattr(attention, "k_norm") else None
        widths = self._qkv.out_features
        self._num_heads, self._num_kv_heads = widths[0] // self._head_dim, widths[1] // self._head_dim

    def __call__(self, hidden_TE: Tensor, cos_TD: Tensor, sin_TD: Tensor, step: AttentionStep) -> Tensor:
        num_heads, num_kv_heads = self._num_heads, self._num_kv_heads
        heads_THD = self._qkv.project(hidden_TE, norm=self._norm_in).unflatten(1, (-1, self._head_dim))
        query_THD = heads_THD[:, :num_heads]
        key_value_T2KD = heads_THD[:, num_heads:].unflatten(1, (2, num_kv_heads))
        if self._norm_q is not None and self._norm_k is not None:
            query_THD.copy_(self._norm_q(query_THD))
            key_value_T2KD[:, 0].copy_(self._norm_k(key_value_T2KD[:, 0]))
        if self._kernels is None:
            rotate_(heads_THD[:, : num_heads + num_kv_heads], cos_TD, sin_TD)
            write_kv(key_value_T2KD, self._index, step)
        else:
            layer = step.layer(self._index)
            self._kernels.rotate_and_write_kv_(
                heads_THD, cos_TD, sin_TD, num_kv_heads, layer=layer, slots=step.write_slots_T
            )
        mixed_THD = attend(query_THD, key_value_T2KD, self._index, step, scaling=self._scaling)
        hidden_TE = self._out.project(mixed_THD.flatten(1), residual=hidden_TE)
        return self._down.project(self._gate_up.gated(hidden_TE, norm=self._norm_mlp), residual=hidden_TE)


def rotate_(heads_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> None:
    """Rotary positions (Su et al. 2021, arXiv 2104.09864), in place; `sin_TD` has its first half negated."""
    first, second = heads_THD.chunk(2, dim=-1)
    swapped = torch.cat((second, first), dim=-1)
    heads_THD.mul_(cos_TD.unsqueeze(1)).addcmul_(swapped, sin_TD.unsqueeze(1))


def norm_of(module: Any) -> RmsNorm:
    return RmsNorm(module.weight, module.variance_epsilon)


def group_of(projection: Projection) -> Any:
    """The layers of one input that this one belongs to."""
    return projection.group
