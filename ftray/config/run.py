"""`kind: run`: one fine-tuning run."""

from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, model_validator

from ftray.config.adapter import AdapterConfig
from ftray.config.chat import ChatConfig
from ftray.config.data import DataConfig
from ftray.config.renamed import with_new_names
from ftray.objectives import ObjectiveConfig, SftConfig, objective_of
from ftray.plugins import PluginName
from ftray.schema import Name, NonNegativeFloat, NonNegativeInt, Place, PositiveFloat, PositiveInt, Strict, Text

Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Strict):
    type: Literal["adamw", "adamw_8bit"] = "adamw"
    """8bit: both moments in 8 bits, for full fine-tuning."""
    learning_rate: PositiveFloat = 2e-4
    lora_plus_ratio: float = Field(default=1.0, ge=1)
    """Rate of B over rate of A (LoRA+, Hayou et al. 2024)."""
    schedule: Literal["constant", "linear", "cosine", "warmup_stable_decay"] = "cosine"
    warmup_steps: NonNegativeInt = 0
    decay_fraction: float = Field(default=0.1, gt=0, le=1)
    """Of all steps: the decay of warmup_stable_decay."""
    weight_decay: NonNegativeFloat = 0.0
    betas: list[Beta] = Field(default=[0.9, 0.999], min_length=2, max_length=2)
    epsilon: PositiveFloat = 1e-8
    max_grad_norm: PositiveFloat = 1.0


class BatchConfig(Strict):
    examples_per_step: PositiveInt = 32
    tokens_per_micro_batch: PositiveInt = 4096


class ZeroConfig(Strict):
    stage: Literal[0, 1, 2, 3] = 2
    offload: Literal["none", "cpu"] = "none"
    """cpu: optimizer state, and at stage 3 weights, in host memory."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Further keys of DeepSpeed's zero_optimization, as they are."""

    @model_validator(mode="after")
    def agree(self):
        if self.offload != "none" and self.stage == 0:
            raise ValueError("offload needs a stage of 1, 2 or 3")
        ours = {"stage", "contiguous_gradients", "overlap_comm"}
        if self.offload != "none":  # with none, NVMe offload may be given there
            ours |= {"offload_optimizer", "offload_param"}
        nvme = any("nvme" in str(self.settings.get(key)) for key in ("offload_optimizer", "offload_param"))
        if nvme and self.stage != 3:
            raise ValueError("settings: offload to NVMe needs stage 3")
        if taken := sorted(self.settings.keys() & ours):
            raise ValueError(f"settings: {taken[0]} is set by ftray; see zero.stage and zero.offload")
        return self


class MemoryConfig(Strict):
    activation_checkpointing: bool = False
    """Keeps one activation a layer and computes the rest again in the backward."""
    liger_kernels: bool = False
    """Fused Triton kernels for norms, rotary embedding and MLP; GPUs only."""
    sequence_parallel: PositiveInt = 1
    """Workers that share each row of tokens (Ulysses): for long examples."""


class CheckpointConfig(Strict):
    every: PositiveInt = 100
    """steps; the last step is always saved."""
    keep: PositiveInt = 3


class EvaluationConfig(Strict):
    every: PositiveInt = 100
    """steps; also after the last one, where data.eval is given."""
    samples: NonNegativeInt = 0
    """So many evaluation prompts are answered each time, into samples.jsonl and the report."""
    sample_tokens: PositiveInt = 48
    """Of an answer at most; each costs a forward pass over the prompts."""


def check_count(value: Any) -> int | list[int]:
    numbers = value if isinstance(value, list) else [value]
    whole = all(isinstance(number, int) and not isinstance(number, bool) and number > 0 for number in numbers)
    if not whole or (isinstance(value, list) and (len(value) != 2 or value[0] > value[1])):
        raise ValueError("give one number from 1 on, or [min, max]")
    return value


class WorkersConfig(Strict):
    count: Annotated[int | list[int], PlainValidator(check_count)] = 1
    """[min, max]: as many as the cluster has, fewer when hosts go, more when they come back."""
    gpus_each: Literal[0, 1] = 0
    cpus_each: PositiveInt = 1
    max_failures: NonNegativeInt = 3
    """Restarts of the worker group before the run is given up."""

    @property
    def min_count(self) -> int:
        return self.count if isinstance(self.count, int) else self.count[0]

    @property
    def max_count(self) -> int:
        return self.count if isinstance(self.count, int) else self.count[1]


class GuardConfig(Strict):
    """What happens when the loss of a step is not a number, or far above the recent ones, and when nothing happens."""

    on_bad_loss: Literal["stop", "skip"] = "stop"
    """skip: back to the last checkpoint, and past this step."""
    spike_factor: float | None = Field(default=None, gt=1)
    """Times the median of 50 steps; null: only NaN and infinity."""
    max_skips: PositiveInt = 3
    hang_timeout_s: PositiveFloat = 1800
    """Without progress in a step, evaluation or save: the workers start again."""


class TrackingConfig(Strict):
    tags: list[Name] = Field(default_factory=list)
    """`ftray runs list --tag` finds the run by them; W&B shows them too."""
    notes: Text | None = None
    """What the run is for, in a sentence: in the report, and in W&B."""
    wandb: Literal["off", "auto", "offline", "online"] = "off"
    """auto: online with a key, else offline."""
    wandb_project: Text = "ftray"
    wandb_group: Text | None = None
    """A sweep gives its trials one: its name."""
    tensorboard: bool = False
    """Event files in the run directory."""


class RunConfig(Strict):
    kind: Literal["run"]
    name: Name
    base_model: Place
    seed: int = Field(default=0, ge=0, lt=2**31)
    epochs: PositiveInt | None = None
    max_steps: PositiveInt | None = None
    data: DataConfig
    objective: ObjectiveConfig = SftConfig()
    chat: ChatConfig | None = None
    """null: as the base model says."""
    adapter: AdapterConfig | None = AdapterConfig()
    """null: full fine-tuning."""
    optimizer: OptimizerConfig = OptimizerConfig()
    batch: BatchConfig = BatchConfig()
    zero: ZeroConfig = ZeroConfig()
    memory: MemoryConfig = MemoryConfig()
    compile: bool | Literal["auto"] = "auto"
    """torch.compile of the decoder layers: faster once warm, after a minute of compiling. auto: in long runs, not at
    ZeRO-3."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    workers: WorkersConfig = WorkersConfig()
    guard: GuardConfig = GuardConfig()
    callbacks: list[PluginName] = Field(default_factory=list)
    """module:NAME of functions of one's own; each gets every record of metrics.jsonl, where the driver runs."""
    tracking: TrackingConfig = TrackingConfig()
    runs_dir: Place = "runs"
    registry: Place = "registry"

    @model_validator(mode="before")
    @classmethod
    def rename(cls, tree: Any) -> Any:
        return with_new_names(tree)

    @model_validator(mode="after")
    def agree(self):
        if problems := [problem for rule in RULES if (problem := rule(self)) is not None]:
            raise ValueError("\n".join(problems))  # a line each
        return self

    @property
    def longest_example(self) -> int:
        """Tokens that an example may have, over all its sequences: what a micro-batch must hold."""
        return self.data.max_example_tokens * objective_of(self.objective).sequences_per_example


# What one section of a run says about another: each returns the problem, or None.


def one_length(run: RunConfig) -> str | None:
    return "give either `epochs` or `max_steps`" if (run.epochs is None) == (run.max_steps is None) else None


def split_is_for_documents(run: RunConfig) -> str | None:
    if run.data.overlong == "split" and objective_of(run.objective).shape != "document":
        return f"data.overlong: split is for documents (objective text), not {run.objective.type}"
    return None


def optimizer_fits(run: RunConfig) -> str | None:
    if run.optimizer.type == "adamw_8bit" and "offload_optimizer" in run.zero.settings:
        return "optimizer.type: adamw_8bit does not go with offload_optimizer in zero.settings"
    if run.adapter is None and run.optimizer.lora_plus_ratio != 1:
        return "optimizer.lora_plus_ratio needs an adapter"
    return None


def adapter_fits_zero_3(run: RunConfig) -> str | None:
    if run.adapter is None or run.zero.stage != 3:
        return None
    for key, value in (("initialization", "pissa"), ("variant", "dora"), ("quantize_base", "nf4")):
        if getattr(run.adapter, key) == value:
            return f"adapter.{key}: {value} needs whole base weights on every GPU; use zero.stage 2"
    if run.adapter.init_from is not None and run.adapter.modules_to_save:
        return "adapter.init_from: with modules_to_save it needs zero.stage 2 or lower"
    for key in ("experts", "train_tokens"):
        if getattr(run.adapter, key):
            return f"adapter.{key}: PEFT reads whole base weights for it; use zero.stage 2"
    return None


def reference_is_the_start(run: RunConfig) -> str | None:
    starts_elsewhere = run.adapter is not None and run.adapter.init_from is not None
    if starts_elsewhere and objective_of(run.objective).needs_reference:
        return (
            f"adapter.init_from: with objective {run.objective.type} the reference is the base with the adapter off, "
            "which is not where this run would start; train a full model first, or start a new adapter"
        )
    return None


def an_example_fits(run: RunConfig) -> str | None:
    if run.longest_example <= run.batch.tokens_per_micro_batch:
        return None
    pair = objective_of(run.objective).sequences_per_example == 2
    what = "twice data.max_example_tokens (a pair)" if pair else "data.max_example_tokens"
    return (
        f"{what} is {run.longest_example} and must be at most batch.tokens_per_micro_batch "
        f"({run.batch.tokens_per_micro_batch}): an example is never split"
    )


def samples_have_prompts(run: RunConfig) -> str | None:
    if run.evaluation.samples and run.data.eval is None:
        return "evaluation.samples: there is no data.eval whose prompts could be answered"
    return None


def liger_needs_gpus(run: RunConfig) -> str | None:
    if run.memory.liger_kernels and run.workers.gpus_each == 0:
        return "memory.liger_kernels: they run on GPUs only; set workers.gpus_each: 1, or leave them off"
    return None


def workers_share_rows(run: RunConfig) -> str | None:
    ranks, count = run.memory.sequence_parallel, run.workers.count
    if ranks > 1 and (isinstance(count, list) or count % ranks):
        return f"memory.sequence_parallel: {ranks} must divide workers.count ({count}), a fixed number"
    return None


RULES = (
    one_length,
    split_is_for_documents,
    optimizer_fits,
    adapter_fits_zero_3,
    reference_is_the_start,
    an_example_fits,
    samples_have_prompts,
    liger_needs_gpus,
    workers_share_rows,
)
