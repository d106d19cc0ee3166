"""`kind: run`: one fine-tuning run."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ftray.config.schema import Name, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Strict, Text


class ColumnsConfig(Strict):
    """Which columns of a row hold what. Either `messages`, or `prompt` and `completion`."""

    messages: Text | None = None
    prompt: Text | list[Text] | None = None  # several columns are joined by a blank line, empty ones left out
    completion: Text | None = None
    system: Text | None = None

    @model_validator(mode="after")
    def one_shape(self):
        if (self.messages is None) == (self.prompt is None):
            raise ValueError("name either `messages`, or `prompt` and `completion`")
        if (self.prompt is None) != (self.completion is None):
            raise ValueError("`prompt` and `completion` go together")
        if self.messages is not None and self.system is not None:
            raise ValueError("`system` goes with `prompt` and `completion`; messages hold their own system turn")
        return self


class DataConfig(Strict):
    train: Text  # file (.jsonl .json .csv .parquet), `save_to_disk` directory, or hub id
    eval: Text | None = None
    revision: Text | None = None  # of a hub id
    columns: ColumnsConfig | None = None  # None: `messages`, or `prompt` and `completion`, as the file has them
    max_example_tokens: PositiveInt = 2048
    overlong: Literal["error", "truncate", "drop"] = "error"
    shuffle: bool = True


class ObjectiveConfig(Strict):
    type: Literal["sft"] = "sft"


class AdapterConfig(Strict):
    rank: PositiveInt = 16
    alpha: PositiveFloat = 32
    targets: Literal["all-linear"] | list[Text] = "all-linear"
    dropout: float = Field(default=0.0, ge=0, lt=1)  # step losses agree across worker counts only at 0


Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Strict):
    learning_rate: PositiveFloat = 2e-4
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: NonNegativeInt = 0
    weight_decay: NonNegativeFloat = 0.0
    betas: list[Beta] = Field(default=[0.9, 0.999], min_length=2, max_length=2)
    epsilon: PositiveFloat = 1e-8
    max_grad_norm: PositiveFloat = 1.0


class BatchConfig(Strict):
    examples_per_step: PositiveInt = 32
    tokens_per_micro_batch: PositiveInt = 4096


class ZeroConfig(Strict):
    stage: Literal[0, 1, 2, 3] = 2


class CheckpointConfig(Strict):
    every: PositiveInt = 100  # steps; the last step is always saved
    keep: PositiveInt = 3


class EvaluationConfig(Strict):
    every: PositiveInt = 100  # steps; also after the last one, where data.eval is given


class WorkersConfig(Strict):
    count: PositiveInt = 1
    gpus_each: Literal[0, 1] = 0
    cpus_each: PositiveInt = 1
    max_failures: NonNegativeInt = 3  # restarts of the worker group before the run is given up


class GuardConfig(Strict):
    """What happens when the loss of a step is not a number, or far above the recent ones."""

    on_bad_loss: Literal["stop", "skip"] = "stop"  # skip: back to the last checkpoint, and past this step
    spike_factor: float | None = Field(default=None, gt=1)  # times the median of 50 steps; null: only NaN and infinity
    max_skips: PositiveInt = 3


class TrackingConfig(Strict):
    wandb: Literal["off", "auto", "offline", "online"] = "off"  # auto: online with a key, else offline
    wandb_project: Text = "ftray"


class RunConfig(Strict):
    kind: Literal["run"]
    name: Name
    base_model: Text
    seed: int = Field(default=0, ge=0, lt=2**31)
    epochs: PositiveInt | None = None
    max_steps: PositiveInt | None = None
    data: DataConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    adapter: AdapterConfig | None = AdapterConfig()  # null: full fine-tuning
    optimizer: OptimizerConfig = OptimizerConfig()
    batch: BatchConfig = BatchConfig()
    zero: ZeroConfig = ZeroConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    workers: WorkersConfig = WorkersConfig()
    guard: GuardConfig = GuardConfig()
    tracking: TrackingConfig = TrackingConfig()
    runs_dir: Text = "runs"
    registry: Text = "registry"

    @model_validator(mode="after")
    def agree(self):
        if (self.epochs is None) == (self.max_steps is None):
            raise ValueError("give either `epochs` or `max_steps`")
        if self.data.max_example_tokens > self.batch.tokens_per_micro_batch:
            raise ValueError(
                f"data.max_example_tokens ({self.data.max_example_tokens}) must be at most "
                f"batch.tokens_per_micro_batch ({self.batch.tokens_per_micro_batch}): an example is never split"
            )
        return self
