"""What tuning gained and what it broke, measured on the product of a run: exact match and the loss on general text."""

from dataclasses import dataclass
from pathlib import Path

from ftray.config.run import RunConfig
from ftray.config.serve import AdaptersConfig, EngineConfig

KV_CACHE_TOKENS = 16384


@dataclass(frozen=True)
class ScoreJob:
    """Products of runs over one base model."""

    base_model: str
    adapters: dict[str, Path | None]  # by name; None: the base model as it is
    run: RunConfig  # its held-out questions
    general_text: str | None

    @property
    def needs(self) -> dict[str, float]:
        """Of Ray: a worker of the run scores what a worker of the run has trained."""
        return {"num_cpus": self.run.workers.cpus_each, "num_gpus": self.run.workers.gpus_each}


@dataclass(frozen=True)
class Score:
    accuracy: float | None  # exact match on data.eval; None: the objective asks no questions
    general_loss: float | None  # per token of `compare.general_text`


def score_products(job: ScoreJob) -> dict[str, Score]:
    """In a Ray task. The base is loaded once for all."""
    from ftray.evaluate.offline import evaluate_offline, text_loss
    from ftray.evaluate.task import load_questions
    from ftray.infer.engines import load_adapter
    from ftray.infer.torch_engine import TorchEngine
    from ftray.model.base import context_limit, prepare_base
    from ftray.model.hardware import choose_hardware

    data = job.run.data
    asks = job.run.objective.type == "sft" and data.eval is not None
    questions = load_questions(data) if asks else []
    base = prepare_base(job.base_model)
    context = min(2 * data.max_example_tokens, context_limit(base) or 2 * data.max_example_tokens)
    settings = EngineConfig(context_tokens=context, kv_cache_tokens=max(KV_CACHE_TOKENS, context))
    hardware = choose_hardware(use_gpu=job.run.workers.gpus_each > 0)
    engine = TorchEngine(base, hardware, settings, AdaptersConfig())
    scores = {}
    for name, directory in job.adapters.items():
        key = name if directory is not None else None
        if directory is not None:
            load_adapter(engine, name, directory)
        accuracy = evaluate_offline(engine, questions, data, adapter=key, model=name).accuracy if asks else None
        general = None
        if job.general_text is not None:
            source, tokens = job.general_text, data.max_example_tokens
            general = text_loss(engine, "compare.general_text", source, max_tokens=tokens, adapter=key)
        scores[name] = Score(accuracy, general)
        if key is not None:
            engine.unload_adapter(key)
    engine.close()
    return scores
