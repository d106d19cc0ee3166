"""The embedded engine: torch and transformers, on CPU or GPU, with many adapters in one forward pass.

Every step runs one packed row through the model: a token of each decoding sequence, then pieces of prompts. New
sequences join and finished ones leave between steps (Orca, Yu et al. 2022).
"""

import contextlib
import itertools
from collections.abc import Iterator, Sequence as Many
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ftray.config.serve import AdaptersConfig, EngineConfig
from ftray.errors import FtrayError
from ftray.infer.checks import check_request, check_unused
from ftray.infer.protocol import EngineStats, FinishReason, Request, StructuredOutput, TokenEvent, TokenLogprobs
from ftray.infer.structure import GrammarMatcher, Grammars
from ftray.infer.text import TextStream
from ftray.infer.torch_engine.attention import register_paged_attention
from ftray.infer.torch_engine.kv_cache import PAGE_TOKENS, KVCache
from ftray.infer.torch_engine.lora.bank import LoraBank
from ftray.infer.torch_engine.lora.slots import HostAdapter
from ftray.infer.torch_engine.pooling import Embedding, embedding_of
from ftray.infer.torch_engine.sampler import TokenSampler, logprobs_of, sample
from ftray.infer.torch_engine.scheduler import Scheduler
from ftray.infer.torch_engine.sequence import Piece, Sequence
from ftray.infer.torch_engine.text_model import TextModel, seen_heads
from ftray.model.adapters.weights import check_rank, read_adapter
from ftray.model.base import BaseModel, check_length, generation_stop_ids, load_tokenizer
from ftray.model.chat import stop_token_ids
from ftray.model.hardware import Hardware
from ftray.model.packed import PackedRow
from ftray.model.packed_attention import packed_layout
from ftray.model.weights import load_weights

KEPT_STATES = 2  # of recurrent layers, for each sequence that may run: of its prompt, and of its answer
LONGER = b"\0long"  # what is computed with another rotation is not the same


class TorchEngine:
    def __init__(self, base: BaseModel, hardware: Hardware, config: EngineConfig, adapters: AdaptersConfig):
        check_length(base, config.context_tokens, key="engine.context_tokens")
        self.base = base
        self.hardware = hardware
        self.config = config
        self.max_rank = adapters.rank_limit
        self.tokenizer = load_tokenizer(base)
        self.model = load_weights(base, hardware, attention=register_paged_attention()).eval().requires_grad_(False)
        self.stop_ids = stop_token_ids(self.tokenizer) | generation_stop_ids(base)
        shape = self.model.config.get_text_config()
        self.vocab_size: int = shape.vocab_size
        heads = seen_heads(self.model)
        self._bank = LoraBank(self.model, device_budget=adapters.device_budget, rounded=adapters.dtype == "bfloat16")
        self._text = TextModel(self.model, self._bank, max_kept_states=KEPT_STATES * config.max_sequences)
        self._grammars = Grammars(self.tokenizer, vocab_size=self.vocab_size, stop_ids=self.stop_ids)
        like = next(self.model.parameters())
        self._cache = KVCache(heads, num_tokens=config.kv_cache_tokens, like=like)
        self._scheduler = Scheduler(
            self._cache.num_pages,
            max_sequences=config.max_sequences,
            max_prefill_tokens=config.max_prefill_tokens,
            adapters=self._bank,
            states=self._text.states,
        )
        self._sequences: dict[str, list[Sequence]] = {}  # the unfinished answers of each request
        self._loads = itertools.count()
        self._salts: dict[str | None, bytes] = {None: b"base"}
        self._prompt_tokens = self._prompt_tokens_cached = 0

    # -- requests ------------------------------------------------------------------------------------------------

    def prepare_structured_output(self, structure: StructuredOutput, num_requests: int = 1) -> None:
        self._grammars.prepare(structure, num_requests)

    def add(self, request: Request) -> None:
        max_tokens = check_request(
            request, context_tokens=self.config.context_tokens, vocab_size=self.vocab_size, loaded=self._bank
        )
        if request.id in self._sequences:
            raise FtrayError(f"{request.id}: a request of that id is in this engine")
        structure = request.sampling.structure
        matcher = self._grammars.matcher(structure) if structure is not None else None
        first, *others = [self._sequence(request, index, max_tokens, matcher) for index in range(request.sampling.n)]
        first.siblings = others
        for other in others:  # the first one computes the prompt
            other.prompt_logprobs = first.prompt_logprobs
        self._sequences[request.id] = [first, *others]
        self._scheduler.add(first)

    def _sequence(self, request: Request, index: int, max_tokens: int, matcher: GrammarMatcher | None) -> Sequence:
        salt = self._salts[request.adapter] + b"\0" + request.cache_salt.encode()
        return Sequence(
            request=request,
            index=index,
            text=TextStream(self.tokenizer, request.sampling.stop),
            sampler=TokenSampler(request.sampling, index=index, matcher=matcher.copy() if matcher else None),
            max_tokens=max_tokens,
            salt=salt + LONGER if self._text.rotary.is_long(len(request.prompt_ids)) else salt,
            tokens=list(request.prompt_ids),
        )

    def cancel(self, request_id: str) -> None:
        for sequence in self._sequences.pop(request_id, []):
            self._scheduler.remove(sequence)

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    @torch.inference_mode()
    def step(self) -> list[TokenEvent]:
        # Sequences of neighbouring slots side by side: the multi-adapter layer then has few matmuls to do.
        pieces = sorted(self._scheduler.plan(), key=self._row_order)
        if not pieces:
            return []
        self._cache.clear(self._scheduler.pool.take_unclean())
        logits_nV = self._forward(pieces)
        drawn = [piece.sequence for piece in pieces if piece.is_last]
        for piece in pieces:
            self._scheduler.computed(piece)
            self._text.states.keep(piece.sequence)
        contexts = [(s.request.prompt_ids, s.tokens[s.num_prompt :]) for s in drawn]
        picked = sample(logits_nV, [s.sampler for s in drawn], contexts)
        return [self._advance(sequence, *choice) for sequence, choice in zip(drawn, picked, strict=True)]

    def _row_order(self, piece: Piece) -> tuple[int, tuple[int, int]]:
        """Single tokens, whole prompts, the rest of prompts: as `AttentionStep` wants them."""
        kind = 0 if piece.num_tokens == 1 else 1 if piece.sequence.num_cached == 0 else 2
        return kind, self._bank.order(piece.sequence.request.adapter)

    def _forward(self, pieces: list[Piece]) -> Tensor:
        """Logits [n, V] after the newest token of every sequence whose last token is in the step."""
        hidden_TE = self._text.of_pieces(pieces, self._cache)
        self._report_prompts(pieces, hidden_TE)
        ends = itertools.accumulate(p.num_tokens for p in pieces)
        last = [end - 1 for end, piece in zip(ends, pieces, strict=True) if piece.is_last]
        return self._text.logits(hidden_TE.index_select(0, torch.tensor(last, dtype=torch.long).to(hidden_TE.device)))

    def _report_prompts(self, pieces: list[Piece], hidden_TE: Tensor) -> None:
        """The log-probabilities of prompt tokens, where they are asked for. Each is known at the token before."""
        row = 0
        for piece in pieces:
            sequence = piece.sequence
            if sequence.wants_prompt_logprobs:
                # Some may be told already: the sequence was pushed back and runs again.
                start, wanted = sequence.num_cached, sequence.request.sampling.prompt_logprobs or 0
                first = max(start, len(sequence.prompt_logprobs))
                end = min(start + piece.num_tokens, sequence.num_prompt - 1)
                if first < end:
                    logits = (
                        self._text.logits(hidden_TE[row + first - start : row + end - start]).float().cpu().nan_to_num()
                    )
                    following = sequence.tokens[first + 1 : end + 1]
                    sequence.prompt_logprobs += map(logprobs_of, logits, following, [wanted] * len(following))
            row += piece.num_tokens

    def _advance(self, sequence: Sequence, token: int, logprobs: TokenLogprobs | None) -> TokenEvent:
        is_first = sequence.num_generated == 0
        wants_prompt = sequence.request.sampling.prompt_logprobs is not None
        sequence.tokens.append(token)
        if is_first:
            self._prompt_tokens += sequence.num_prompt
            self._prompt_tokens_cached += sequence.num_found or 0
            for sibling in reversed(sequence.siblings):
                self._scheduler.add(sibling, front=True)
        reason: FinishReason | None = None
        text = ""
        if sequence.sampler.has_failed:
            reason = "structure"
        elif sequence.ends_at(token, self.stop_ids):
            reason = "stop"
        else:
            text = sequence.text.push(token)
            if sequence.text.stopped:
                reason = "stop"
            elif sequence.num_generated >= sequence.max_tokens:
                reason = "length"
        if reason is not None:
            text += sequence.text.finish()
            reason = "stop" if sequence.text.stopped and reason == "length" else reason
            self._finish(sequence)
        elif self._text.rotary.changes_at(len(sequence.tokens)):
            sequence.salt += LONGER
            self._scheduler.compute_again(sequence)
        return TokenEvent(
            sequence.request.id,
            token,
            text,
            sequence.num_generated,
            reason,
            index=sequence.index,
            num_cached_prompt_tokens=sequence.num_found or 0,
            logprobs=logprobs,
            prompt_logprobs=tuple(sequence.prompt_logprobs) if is_first and wants_prompt else None,
            queued_s=sequence.queued_s,
        )

    def _is_stop(self, token: int, request: Request) -> bool:
        return not request.sampling.ignore_eos and (token in self.stop_ids or token in request.stop_ids)

    def _finish(self, sequence: Sequence) -> None:
        self._scheduler.remove(sequence)
        unfinished = self._sequences[sequence.request.id]
        unfinished.remove(sequence)
        if not unfinished:
            del self._sequences[sequence.request.id]

    # -- adapters ------------------------------------------------------------------------------------------------

    def prepare_adapter(self, key: str, directory: Path) -> HostAdapter:
        adapter = read_adapter(directory, label=key)
        check_rank(adapter, self.max_rank, label=key)
        return self._bank.prepare(key, adapter)

    def load_adapter(self, prepared: HostAdapter) -> None:
        check_unused(prepared.key, self._in_flight)
        self._bank.load(prepared)
        # Another load under the same name gets another salt: what the cache knows of the old weights is not found.
        self._salts[prepared.key] = f"{next(self._loads)} {prepared.key}".encode()

    @property
    def _in_flight(self) -> Iterator[Request]:
        return (answers[0].request for answers in self._sequences.values())

    def unload_adapter(self, key: str) -> None:
        check_unused(key, self._in_flight)
        self._bank.unload(key)
        del self._salts[key]

    # -- looking -------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def score(self, row: PackedRow, adapter: str | None) -> Tensor:
        """Log-probabilities [N] of a packed row's targets, through the very linear layers that serve."""
        row = row.to(self.hardware.device)
        with self.pinned(adapter):
            hidden_TE = self._text.of_sequences(row.ids_T, row.positions_T, row.layout, adapter)
        logits_NV = self._text.logits(hidden_TE.index_select(0, row.rows_N)).float()
        return -torch.nn.functional.cross_entropy(logits_NV, row.targets_N, reduction="none")

    @cached_property
    def _embedding(self) -> Embedding:
        """Read at the first use: other bases have none."""
        return embedding_of(self.base.directory, self.base.name)

    @torch.inference_mode()
    def embed(self, texts: Many[Many[int]], adapter: str | None) -> Tensor:
        """[n, E] of texts as token ids, in one row: with a thousand tokens it takes as long as a step with as many."""
        embedding = self._embedding
        lengths = [len(ids) for ids in texts]
        layout = packed_layout(lengths).to(self.hardware.device)
        ids_T = torch.tensor([token for ids in texts for token in ids])
        positions_T = torch.cat([torch.arange(length) for length in lengths])
        with self.pinned(adapter):
            hidden_TE = self._text.of_sequences(ids_T, positions_T, layout, adapter)
        return embedding.pool(hidden_TE, lengths).cpu()

    @contextlib.contextmanager
    def pinned(self, *adapters: str | None) -> Iterator[None]:
        """The adapters have slots on the device while it is open."""
        held: list[str] = []
        try:
            for key in adapters:
                if key is not None:
                    if not self._bank.acquire(key):
                        raise FtrayError(f"{key}: adapters.device_budget is taken by adapters in use; try again")
                    held.append(key)
            yield
        finally:
            for key in held:
                self._bank.release(key)

    def close(self) -> None:
        """Nothing to end: everything lives in this process."""

    def stats(self) -> EngineStats:
        pool, slots = self._scheduler.pool, self._bank.slots
        return EngineStats(
            num_running=len(self._scheduler.running),
            num_waiting=sum(map(len, list(self._sequences.values()))) - len(self._scheduler.running),
            num_preemptions=self._scheduler.num_preemptions,
            kv_tokens_used=pool.num_used * PAGE_TOKENS,
            kv_tokens_total=pool.num_pages * PAGE_TOKENS,
            prompt_tokens=self._prompt_tokens,
            prompt_tokens_cached=self._prompt_tokens_cached,
            adapters=tuple(self._bank.host),
            adapters_on_device=slots.keys,
            device_adapter_bytes=slots.used_bytes,
        )
