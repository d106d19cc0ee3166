"""A plan: a run's memory, time and cost as it is asked for, and by every other setting."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftray.config import RunConfig
from ftray.errors import UserError
from ftray.model.base import EMBEDDED, check_base_name
from ftray.objectives import objective_of
from ftray.plan.gpus import Gpu, find_gpu
from ftray.plan.measure import measure_model
from ftray.plan.model_size import ModelSize, read_model_config
from ftray.plan.options import Option, Work, cheapest, options, plan_option
from ftray.train.engine.stages import check_stage

GIB = 2**30


@dataclass(frozen=True)
class Plan:
    run: RunConfig
    gpu: Gpu
    size: ModelSize
    workers: int
    num_steps: int | None  # None: not known without the number of examples
    source: str  # where the examples' lengths are from
    asked: Option | None  # None where it cannot run
    problem: str | None  # why it cannot
    options: list[Option]

    @property
    def best(self) -> Option | None:
        """The cheapest that fits."""
        return cheapest(self.options)

    def gpu_hours(self, option: Option) -> float | None:
        return None if self.num_steps is None else option.step_s * self.num_steps * self.workers / 3600

    def as_object(self) -> dict[str, Any]:
        """For machines."""
        return {
            "model": vars(self.size) | {"flops": self.size.flops.as_object()},
            "gpu": self.gpu.name,
            "workers": self.workers,
            "steps": self.num_steps,
            "asked": self._described(self.asked) if self.asked is not None else None,
            "problem": self.problem,
            "options": [self._described(option) for option in self.options],
            "cheapest": self.best.settings if self.best is not None else None,
        }

    def _described(self, option: Option) -> dict[str, Any]:
        return {
            "settings": option.settings,
            "memory_gib": {name: round(value / GIB, 3) for name, value in vars(option.memory).items()},
            "total_gib": round(option.memory.total / GIB, 3),
            "fits": option.fits,
            "step_s": round(option.step_s, 4),
            "gpu_hours": self.gpu_hours(option),
        }


def make_plan(
    run: RunConfig,
    *,
    gpu: str,
    count: int | None,
    per_node: int,
    mfu: float,
    examples: int | None,
    example_tokens: int | None,
) -> Plan:
    """Neither weights nor, for well-known models, a network are needed. Raises `UserError`."""
    workers = count or run.workers.max_count
    chip = find_gpu(gpu, workers=workers)
    check_base_name(run.base_model)
    check_count(run, workers)
    size = measure_model(read_model_config(run.base_model), run.adapter, dtype=chip.dtype)
    work, num_steps, source = find_work(run, examples, example_tokens)
    fixed = {"workers": workers, "per_node": per_node, "mfu": mfu}
    problem = problem_of_stage(run, chip)
    asked = plan_option(run, size, chip, work, **fixed) if problem is None else None
    return Plan(run, chip, size, workers, num_steps, source, asked, problem, options(run, size, chip, work, **fixed))


def problem_of_stage(run: RunConfig, gpu: Gpu) -> str | None:
    """Why the workers would refuse the stage on this chip; the other stages are planned all the same."""
    try:
        check_stage(run.zero.stage, gpu.dtype)
    except UserError as error:
        return str(error)
    return None


def check_count(run: RunConfig, workers: int) -> None:
    """What the workers would refuse."""
    if workers % run.memory.sequence_parallel:
        raise UserError(
            f"--count: memory.sequence_parallel {run.memory.sequence_parallel} does not divide {workers} GPUs"
        )


def find_work(run: RunConfig, examples: int | None, example_tokens: int | None) -> tuple[Work, int | None, str]:
    """(work of a step, number of steps or None, where the numbers are from)"""
    share = 1.0
    source = f"examples of {example_tokens} tokens"
    here = run.base_model in EMBEDDED or Path(run.base_model).exists()  # else its tokenizer comes with all its weights
    if example_tokens is None and here and all(Path(source.path).exists() for source in run.data.training_sources):
        from ftray.train.prepared_data import prepare_data

        _, data = prepare_data(run, log=lambda text: None)
        counts = data.train.counts()
        examples = examples or counts["examples"]
        example_tokens = int(counts["tokens"]) // int(counts["examples"])
        share = counts["trained_tokens"] / counts["tokens"]
        source = f"{counts['examples']:,} examples of {example_tokens} tokens on average, as data.train has them"
    elif example_tokens is None:
        example_tokens = run.longest_example // 2
        source = f"examples of {example_tokens} tokens assumed (--example-tokens)"
    num_steps = run.max_steps
    if run.epochs is not None and examples is not None:
        num_steps = -(-run.epochs * examples // run.batch.examples_per_step)
    sequences = objective_of(run.objective).sequences_per_example
    return Work(run.batch.examples_per_step, float(example_tokens), share, sequences), num_steps, source
