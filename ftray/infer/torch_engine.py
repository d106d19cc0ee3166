"""The embedded engine: torch and transformers, on CPU or GPU, with many adapters in one forward pass.

Every step runs one packed row through the model: a token of each running sequence, then the prompts of newly
admitted ones. New sequences join and finished ones leave between steps (Orca, Yu et al. 2022).
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ftray.config.serve import EngineConfig
from ftray.errors import UserError
from ftray.infer.attention import AttentionStep, decode_context, register_paged_attention
from ftray.infer.kv_cache import KVCache
from ftray.infer.protocol import EngineStats, FinishReason, Request, TokenEvent
from ftray.infer.sampler import make_generator, sample
from ftray.infer.scheduler import Scheduler, Sequence
from ftray.infer.text import TextStream
from ftray.model.adapter import read_adapter
from ftray.model.base import BaseModel, check_length, load_tokenizer, load_weights
from ftray.model.chat import stop_token_ids
from ftray.model.hardware import Hardware
from ftray.model.multi_lora import LoraBank
from ftray.model.packed import PackedRow, decoder_of
from ftray.model.packed_attention import packed_layout


class TorchEngine:
    def __init__(self, base: BaseModel, hardware: Hardware, config: EngineConfig, *, max_rank: int):
        check_length(base, config.context_tokens, key="engine.context_tokens")
        self.base = base
        self.hardware = hardware
        self.config = config
        self.max_rank = max_rank
        self.tokenizer = load_tokenizer(base)
        self.model = load_weights(base, hardware, attention=register_paged_attention()).eval().requires_grad_(False)
        self.stop_ids = stop_token_ids(self.tokenizer) | generation_stop_ids(self.model)
        self._bank = LoraBank(self.model)
        self._adapter_bytes: dict[str, int] = {}
        shape = self.model.config.get_text_config()
        self._cache = KVCache(
            num_layers=shape.num_hidden_layers,
            num_kv_heads=shape.num_key_value_heads,
            head_dim=getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads,
            num_tokens=config.kv_cache_tokens,
            like=next(self.model.parameters()),
        )
        self._scheduler = Scheduler(
            self._cache, max_sequences=config.max_sequences, max_prefill_tokens=config.max_prefill_tokens
        )

    # -- requests ------------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        num_prompt, context = len(request.prompt_ids), self.config.context_tokens
        wanted = request.sampling.max_tokens
        if num_prompt == 0:
            raise UserError("the prompt is empty")
        if num_prompt + (wanted or 1) > context:
            raise UserError(
                f"prompt of {num_prompt} tokens and max_tokens {wanted or 1} exceed this endpoint's context of "
                f"{context} tokens (engine.context_tokens); shorten the prompt or lower max_tokens"
            )
        if request.adapter is not None and request.adapter not in self._bank:
            raise UserError(f"{request.adapter}: not loaded in this engine")
        sequence = Sequence(
            request=request,
            text=TextStream(self.tokenizer, request.sampling.stop),
            generator=make_generator(request.sampling),
            max_tokens=wanted if wanted is not None else context - num_prompt,
        )
        self._scheduler.waiting.append(sequence)

    def cancel(self, request_id: str) -> None:
        sequence = self._scheduler.find(request_id)
        if sequence is not None:
            self._scheduler.remove(sequence)

    @property
    def has_work(self) -> bool:
        return bool(self._scheduler.running or self._scheduler.waiting)

    @torch.inference_mode()
    def step(self) -> list[TokenEvent]:
        # Sequences of one adapter side by side: the multi-adapter layer then sees few segments.
        decoding = sorted(self._scheduler.running, key=adapter_order)
        admitted = sorted(self._scheduler.admit(), key=adapter_order)
        self._scheduler.running += admitted
        if not decoding and not admitted:
            return []
        logits_nV = self._forward(decoding, admitted)
        sequences = [*decoding, *admitted]
        tokens = sample(logits_nV, [s.request.sampling for s in sequences], [s.generator for s in sequences])
        return [self._advance(sequence, token) for sequence, token in zip(sequences, tokens, strict=True)]

    def _forward(self, decoding: list[Sequence], admitted: list[Sequence]) -> Tensor:
        """Logits [n, V] after the newest token of every sequence."""
        device = self.hardware.device
        ids = [s.tokens[-1] for s in decoding] + [i for s in admitted for i in s.request.prompt_ids]
        prompt_lengths = [len(s.request.prompt_ids) for s in admitted]
        positions = [torch.tensor([s.num_cached for s in decoding], dtype=torch.long)]
        positions += [torch.arange(length) for length in prompt_lengths]
        slots = [slots_of(s)[s.num_cached : s.num_cached + 1] for s in decoding]
        slots += [slots_of(s)[:length] for s, length in zip(admitted, prompt_lengths, strict=True)]
        step = AttentionStep(
            cache=self._cache,
            write_slots_T=torch.cat(slots).to(device),
            decode=decode_context([slots_of(s) for s in decoding], [s.num_cached + 1 for s in decoding], device)
            if decoding
            else None,
            prompts=packed_layout(prompt_lengths).to(device) if admitted else None,
        )
        counts = [(s.request.adapter, 1) for s in decoding]
        counts += [(s.request.adapter, length) for s, length in zip(admitted, prompt_lengths, strict=True)]
        ends = torch.tensor([1] * len(decoding) + prompt_lengths).cumsum(0) - 1
        hidden_TE = self._hidden(torch.tensor(ids), torch.cat(positions), counts, step)
        return self.model.get_output_embeddings()(hidden_TE.index_select(0, ends.to(device)))

    def _hidden(
        self, ids_T: Tensor, positions_T: Tensor, counts: list[tuple[str | None, int]], step: AttentionStep
    ) -> Tensor:
        device = self.hardware.device
        with self._bank.apply(counts):
            return decoder_of(self.model)(
                input_ids=ids_T[None].to(device), position_ids=positions_T[None].to(device), use_cache=False, step=step
            ).last_hidden_state[0]

    def _advance(self, sequence: Sequence, token: int) -> TokenEvent:
        sequence.tokens.append(token)
        reason: FinishReason | None = None
        text = ""
        if token in self.stop_ids:
            reason = "stop"
        else:
            text = sequence.text.push(token)
            if sequence.text.stopped:
                reason = "stop"
            elif len(sequence.tokens) >= sequence.max_tokens:
                reason = "length"
        if reason is not None:
            text += sequence.text.finish()
            self._scheduler.remove(sequence)
        return TokenEvent(sequence.request.id, token, text, len(sequence.tokens), reason)

    # -- adapters ------------------------------------------------------------------------------------------------

    def load_adapter(self, key: str, directory: Path) -> int:
        adapter = read_adapter(directory, label=key)
        if adapter.max_rank > self.max_rank:
            raise UserError(
                f"{key}: rank {adapter.max_rank} is over this endpoint's adapters.max_rank ({self.max_rank})"
            )
        self._bank.load(key, adapter)
        self._adapter_bytes[key] = adapter.num_bytes
        return adapter.num_bytes

    def unload_adapter(self, key: str) -> None:
        self._bank.unload(key)
        del self._adapter_bytes[key]

    # -- looking -------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def score(self, row: PackedRow, adapter: str | None) -> Tensor:
        """Log-probabilities [N] of a packed row's targets, through the very layers that serve."""
        row = row.to(self.hardware.device)
        step = AttentionStep(cache=None, write_slots_T=None, decode=None, prompts=row.layout)
        hidden_TE = self._hidden(row.ids_T, row.positions_T, [(adapter, len(row.ids_T))], step)
        logits_NV = self.model.get_output_embeddings()(hidden_TE.index_select(0, row.rows_N)).float()
        return -torch.nn.functional.cross_entropy(logits_NV, row.targets_N, reduction="none")

    def stats(self) -> EngineStats:
        total = self._cache.num_tokens
        return EngineStats(
            num_running=len(self._scheduler.running),
            num_waiting=len(self._scheduler.waiting),
            kv_tokens_used=total - self._cache.num_free_tokens,
            kv_tokens_total=total,
            adapters=tuple(self._adapter_bytes),
        )


def generation_stop_ids(model: Any) -> set[int]:
    """What the model's own generation_config.json ends an answer with: one id, several, or none."""
    ids = model.generation_config.eos_token_id if model.generation_config is not None else None
    return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)


def adapter_order(sequence: Sequence) -> str:
    return sequence.request.adapter or ""


def slots_of(sequence: Sequence) -> Tensor:
    assert sequence.slots is not None, "a running sequence has its cache slots"
    return sequence.slots


def generate(engine: Any, requests: list[Request]) -> dict[str, str]:
    """Runs requests to their end, in this thread; returns {request id: text}."""
    for request in requests:
        engine.add(request)
    texts = {request.id: "" for request in requests}
    while engine.has_work:
        for event in engine.step():
            texts[event.request_id] += event.text
    return texts
