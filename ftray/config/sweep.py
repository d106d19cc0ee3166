"""`kind: sweep`: a run, a space over its keys, and how to search it."""

from typing import Annotated, Any, Literal

from pydantic import Field, PlainSerializer, PlainValidator, field_validator, model_validator

from ftray.config.domains import Choice, Range, as_yaml, expression_order, parse_domain
from ftray.config.expression import Expression
from ftray.config.renamed import by_new_keys
from ftray.schema import Name, NonNegativeInt, Place, PositiveFloat, PositiveInt, Strict, Text

SpaceValue = Annotated[Any, PlainValidator(parse_domain), PlainSerializer(as_yaml)]
# A trial is told apart by these, or the sweep itself sets them.
NOT_SWEPT = {
    "kind": "it is the file's kind",
    "name": "each trial gets its own",
    "runs_dir": "trials lie in the sweep's directory",
    "registry": "only the best trial is published",
    "seed": "give `seeds` beside `space`",
    "data.eval": "losses on other data cannot be compared",
    "workers": "it does not change what is learned; give it in `overrides`",
    "tracking": "it is the same for all trials; give it in `overrides`",
}


VARIABLES = "variables."  # keys that no run has: values that expressions use


def is_variable(key: str) -> bool:
    return key.startswith(VARIABLES)


def why_not_in_population(key: str) -> str | None:
    if key.startswith(("optimizer.", VARIABLES)) and key != "optimizer.type":
        return None
    return "with search.scheduler pbt trials take over each other's weights: it must not differ"


def why_not_swept(key: str) -> str | None:
    found = (reason for refused, reason in NOT_SWEPT.items() if key == refused or key.startswith(f"{refused}."))
    return next(found, None)


class BudgetConfig(Strict):
    """Over all trials; the sweep ends with the first that is used up. Steps and tokens count when they are reported, at
    evaluations."""

    steps: PositiveInt | None = None
    tokens: PositiveInt | None = None
    hours: PositiveFloat | None = None

    @property
    def is_set(self) -> bool:
        return any(limit is not None for limit in (self.steps, self.tokens, self.hours))

    def spent(self, *, steps: int, tokens: int, hours: float) -> str | None:
        """Which limit is used up; None: none."""
        if self.steps is not None and steps >= self.steps:
            return f"the budget of {self.steps:,} steps is spent"
        if self.tokens is not None and tokens >= self.tokens:
            return f"the budget of {self.tokens:,} tokens is spent"
        if self.hours is not None and hours >= self.hours:
            return f"the budget of {self.hours:g} hours is spent"
        return None


class SearchConfig(Strict):
    algorithm: Literal["grid", "random", "tpe"] = "tpe"
    trials: PositiveInt | None = None
    """points; each is run once for every seed. grid: null for all points."""
    metric: Literal["eval_loss", "loss"] = "eval_loss"
    mode: Literal["min", "max"] = "min"
    seed: NonNegativeInt = 0
    budget: BudgetConfig = BudgetConfig()
    scheduler: Literal["none", "asha", "median", "pbt"] = "none"
    """pbt: population-based training of the learning rate."""
    grace_steps: PositiveInt | None = None
    """No trial is stopped before; null: at the first evaluation."""
    reduction_factor: int = Field(default=3, ge=2)
    """asha: one in so many goes on at each rung."""
    generation_steps: PositiveInt | None = None
    """pbt: trials take over from each other so often; null: each evaluation."""
    fused: Literal["auto", "off"] | PositiveInt = "auto"
    """LoRA trials side by side over one base, so many at a time. auto: 8, where the keys allow it; off: a process
    each."""
    max_concurrent: PositiveInt | None = None
    """Trials at a time; null: as many as the cluster has workers for."""

    @model_validator(mode="after")
    def agree(self):
        if self.algorithm != "grid" and self.trials is None and not self.budget.is_set:
            raise ValueError(f"algorithm {self.algorithm} needs an end: give trials, or a budget of steps or tokens")
        if self.scheduler == "pbt" and self.algorithm == "tpe":
            raise ValueError("scheduler pbt starts all trials at once: choose algorithm random or grid")
        if self.scheduler == "pbt" and self.algorithm == "random" and self.trials is None:
            raise ValueError("scheduler pbt needs to know the size of its population: give trials")
        if self.generation_steps is not None and self.scheduler != "pbt":
            raise ValueError(f"generation_steps is for scheduler pbt; this is {self.scheduler}")
        return self

    def refuse_unequal_chances(self, sweeps_base: bool) -> None:
        """What is compared must be searched alike. Raises ValueError."""
        unequal = {
            "search.algorithm: tpe seldom tries what looks worse; give grid or random": self.algorithm == "tpe",
            f"search.scheduler: {self.scheduler} stops what learns late; give none": self.scheduler != "none",
            "search.budget: it may be spent before the last choice had its trials; give search.trials": (
                self.budget.is_set
            ),
            "space.base_model: losses under different tokenizers cannot be compared": sweeps_base,
        }
        if problem := next((text for text, is_so in unequal.items() if is_so), None):
            raise ValueError(f"compare: {problem}")


def check_seeds(value: Any) -> tuple[int, ...]:
    """A number of seeds, or the seeds."""
    if value in (0, []):
        raise ValueError("give a number of seeds from 1 on, or a list of different ones")
    seeds: Any = tuple(range(value)) if isinstance(value, int) and not isinstance(value, bool) else value
    whole = isinstance(seeds, (list, tuple)) and all(isinstance(s, int) and 0 <= s < 2**31 for s in seeds)
    if not whole or len(set(seeds)) < len(seeds):
        raise ValueError("give a number of seeds from 1 on, or a list of different ones")
    return tuple(seeds)


class CompareConfig(Strict):
    """Which of a few ways is best, each at its own best point: LoRA or full fine-tuning, say."""

    key: Text
    """Of the space; the first of its choices is what the others are compared with."""
    general_text: Place | None = None
    """Rows of plain text: the loss on them tells what tuning has broken."""


class PublishBestConfig(Strict):
    name: Name | None = None
    """null: the sweep's own."""
    alias: Name | None = None
    """Moved to the version, such as candidate."""


class SweepConfig(Strict):
    kind: Literal["sweep"]
    name: Name
    run: Place
    """The run file that every trial starts from."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Of the run's keys, the same in all trials."""
    space: dict[str, SpaceValue] = Field(min_length=1)
    seeds: Annotated[Any, PlainValidator(check_seeds), PlainSerializer(list)] = ()
    """Not given: the run's own."""
    search: SearchConfig
    compare: CompareConfig | None = None
    publish: PublishBestConfig | Literal["off"] = PublishBestConfig()
    """What the best trial's adapter is published as, in the run's registry. off: it stays in the trial's directory."""

    @field_validator("space", mode="before")
    @classmethod
    def rename(cls, settings: Any) -> Any:
        return by_new_keys(settings)

    @model_validator(mode="after")
    def agree(self):
        if self.compare is not None and not isinstance(self.space.get(self.compare.key), Choice):
            choices = [key for key, domain in self.space.items() if isinstance(domain, Choice)]
            have = f"the space has {', '.join(choices)}" if choices else "the space has none"
            raise ValueError(f"compare.key: {self.compare.key} is no list of choices in the space; {have}")
        if self.compare is not None:
            self.search.refuse_unequal_chances("base_model" in self.space)
        for key in self.space:
            if (reason := why_not_swept(key)) is not None:
                raise ValueError(f"space.{key}: it cannot be swept: {reason}")
            for other in self.space:
                if key.startswith(f"{other}."):
                    raise ValueError(f"space.{key}: {other} is swept as a whole already")
        if self.search.scheduler == "pbt":
            self._check_population()
        expression_order(self.space)
        if all(isinstance(domain, Expression) for domain in self.space.values()):
            raise ValueError("space: there are only expressions, and nothing to choose")
        if self.search.algorithm == "grid":
            for key, domain in self.space.items():
                if isinstance(domain, Range) and domain.points is None:
                    raise ValueError(f"space.{key}: a grid needs to know how many points: add `points: 5`")
        return self

    def _check_population(self) -> None:
        """Trials take over each other's weights and rates."""
        if not isinstance(self.space.get("optimizer.learning_rate"), Range):
            raise ValueError("search.scheduler pbt changes optimizer.learning_rate: give it a range in the space")
        for key in self.space:
            if (reason := why_not_in_population(key)) is not None:
                raise ValueError(f"space.{key}: {reason}")
        if len(self.seeds) > 1:
            raise ValueError(
                "seeds: with search.scheduler pbt each trial is one member of the population: give one seed"
            )
        if self.compare is not None:
            raise ValueError("compare: with search.scheduler pbt trials mix, and cannot be compared")
