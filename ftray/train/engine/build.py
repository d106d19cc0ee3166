"""From a run's config to its engine: weights, adapter, objective, reference, sharding."""

from pathlib import Path

from ftray.config import RunConfig
from ftray.model.adapters.lora import inject_lora, load_weights_from
from ftray.model.adapters.tokens import token_ids
from ftray.model.base import BaseModel, load_tokenizer
from ftray.model.hardware import Hardware
from ftray.model.heads import head_of
from ftray.model.packed import (
    PackedCausalLM,
    logit_chunks,
    prepare_layers,
    register_packed_attention,
)
from ftray.model.sequence_parallel import make_sequence_ranks
from ftray.model.weights import load_weights
from ftray.objectives import make_loss, objective_of
from ftray.train.engine.deepspeed import DeepSpeedEngine
from ftray.train.engine.stages import check_stage
from ftray.train.engine.zero import shard_while_loading


def make_engine(
    config: RunConfig, base: BaseModel, hardware: Hardware, *, init_from: Path | None = None
) -> DeepSpeedEngine:
    check_stage(config.zero.stage, hardware.dtype_name)
    sharding = shard_while_loading(config.zero, hardware)
    attention = register_packed_attention()
    quantize = config.adapter.quantize_base if config.adapter is not None else None
    model = load_weights(base, hardware, attention=attention, quantize=quantize)
    objective = objective_of(config.objective)
    head = head_of(objective.head)
    initial_adapter = None
    if config.adapter is not None:
        ids = token_ids(load_tokenizer(base), config.adapter.train_tokens) if config.adapter.train_tokens else []
        initial_adapter = inject_lora(model, config.adapter, seed=config.seed, head=head, trained_ids=ids)
        if init_from is not None:
            load_weights_from(init_from, model, config.adapter, label=str(config.adapter.init_from))
    num_heads = model.config.get_text_config().num_attention_heads
    ranks = make_sequence_ranks(config.memory.sequence_parallel, num_heads=num_heads)
    chunks = logit_chunks(config.batch.tokens_per_micro_batch, ranks) if config.zero.stage == 3 else None
    reference = None
    if objective.needs_reference and config.adapter is None:
        frozen = load_weights(base, hardware, attention=attention)
        reference = PackedCausalLM(frozen, head=head, num_logit_chunks=chunks, ranks=ranks)
    return DeepSpeedEngine(
        PackedCausalLM(
            prepare_layers(model, config.memory, compiled=config.compile is True),
            head=head,
            num_logit_chunks=chunks,
            ranks=ranks,
        ),
        objective,
        make_loss(config.objective),
        hardware,
        config,
        sharding=sharding,
        reference=reference,
        initial_adapter=initial_adapter,
    )
