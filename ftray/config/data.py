"""The section `data` of a run: sources, columns, what happens to rows that are too long."""

from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from ftray.plugins import PluginName
from ftray.schema import NonNegativeInt, Place, PositiveFloat, PositiveInt, Strict, Text


class ColumnsConfig(Strict):
    """Which columns of a row hold what: a conversation, a document, or a preference pair."""

    messages: Text | None = None
    prompt: Text | list[Text] | None = None
    """Several columns are joined by a blank line, empty ones left out."""
    completion: Text | None = None
    system: Text | None = None
    tools: Text | None = None
    """Functions that are offered, as a list or as JSON text; null: `tools`, where it is there."""
    text: Text | None = None
    """Objective text."""
    chosen: Text | None = None
    """Objective dpo, after `prompt` or `messages`."""
    rejected: Text | None = None

    @property
    def prompts(self) -> list[str]:
        """The columns whose texts are the prompt."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt or []

    @model_validator(mode="after")
    def one_shape(self):
        if (self.chosen is None) != (self.rejected is None):
            raise ValueError("`chosen` and `rejected` go together")
        if self.text is not None and any(value is not None for key, value in self if key != "text"):
            raise ValueError("`text` stands alone")
        if self.messages is not None and self.prompt is not None:
            raise ValueError("`prompt` does not go with `messages`, which hold their own turns")
        if self.chosen is not None and self.completion is not None:
            raise ValueError("`completion` does not go with `chosen` and `rejected`")
        if self.chosen is None and (self.prompt is None) != (self.completion is None):
            raise ValueError("`prompt` and `completion` go together")
        if self.chosen is None and self.messages is None and self.prompt is None and self.text is None:
            raise ValueError("name `messages`, `prompt` and `completion`, `text`, or `chosen` and `rejected`")
        return self


class SourceConfig(Strict):
    """One of several sources; a path alone is one too."""

    path: Place
    name: Text | None = None
    """In figures; null: the file's name without its ending."""
    weight: PositiveFloat | None = None
    """Its share of the examples that an epoch draws, relative to the others' (all have one, or none has)."""
    limit: PositiveInt | None = None
    """Only the first so many rows."""
    columns: ColumnsConfig | None = None
    """null: data.columns."""
    split: Text | None = None
    """Of a hub id or a saved directory."""
    subset: Text | None = None
    """Of a hub id: the configuration's name."""
    revision: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def path_alone(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @property
    def label(self) -> str:
        return self.name or PurePosixPath(self.path.rstrip("/")).name.split(".")[0]


class HoldOutConfig(Strict):
    """Rows of data.train that are kept for evaluation, chosen by the hash of their conversation: equal ones lie on one
    side."""

    fraction: float = Field(gt=0, lt=1)
    seed: NonNegativeInt = 0


def held_out(fraction: float) -> Any:
    return HoldOutConfig(fraction=fraction)


def shape_of(value: Any) -> str:
    """Which arm of a union reads a source."""
    if isinstance(value, list):
        return "several"
    if isinstance(value, float):
        return "fraction"
    if isinstance(value, HoldOutConfig) or (isinstance(value, dict) and "fraction" in value):
        return "held out"
    return "one source" if isinstance(value, dict | SourceConfig) else "a path"


SourceList = Annotated[list[SourceConfig], Field(min_length=1), Tag("several")]
Sources = Annotated[
    Annotated[Place, Tag("a path")] | Annotated[SourceConfig, Tag("one source")] | SourceList, Discriminator(shape_of)
]
EvaluationSources = Annotated[
    Annotated[Place, Tag("a path")]
    | Annotated[SourceConfig, Tag("one source")]
    | SourceList
    | Annotated[float, Field(gt=0, lt=1), AfterValidator(held_out), Tag("fraction")]
    | Annotated[HoldOutConfig, Tag("held out")],
    Discriminator(shape_of),
]


class DataConfig(Strict):
    train: Sources
    """A file (.jsonl .json .csv .tsv .txt .parquet, also .gz and .zst), a glob, a directory, a hub id, or a list of
    sources."""
    eval: EvaluationSources | None = None
    """The same; or a fraction of the training rows, such as 0.05, that are held out."""
    split: Text | None = None
    """Of data.train, where it is a hub id or a saved directory; null: train."""
    subset: Text | None = None
    """Of a hub id: the configuration's name."""
    revision: Text | None = None
    """Of a hub id."""
    columns: ColumnsConfig | None = None
    """None: `messages`, or `prompt` and `completion`, as the file has them."""
    format: PluginName | None = None
    """module:NAME of a `Format` of one's own, which reads a row; instead of `columns`."""
    transform: PluginName | None = None
    """module:NAME of a function of one's own: a row in, the row to be read out, or None to drop it."""
    bad_rows: Literal["error", "skip"] = "error"
    """skip: rows that cannot be trained are left out; result.json has their number and the first ten."""
    max_example_tokens: int = Field(default=2048, ge=2)
    overlong: Literal["error", "truncate", "drop", "split"] = "error"
    """split: documents (objective text) only."""
    shuffle: bool = True

    @property
    def training_sources(self) -> list[SourceConfig]:
        return self._sources(self.train, split=self.split)

    @property
    def evaluation_sources(self) -> list[SourceConfig]:
        """Empty where there are none, or rows are held out."""
        return [] if isinstance(self.eval, HoldOutConfig | float | int) else self._sources(self.eval, split=None)

    @property
    def held_out(self) -> HoldOutConfig | None:
        return self.eval if isinstance(self.eval, HoldOutConfig) else None

    def _sources(
        self, given: str | SourceConfig | list[SourceConfig] | None, *, split: str | None
    ) -> list[SourceConfig]:
        if isinstance(given, str):
            return [SourceConfig(path=given, split=split, subset=self.subset, revision=self.revision)]
        return [] if given is None else given if isinstance(given, list) else [given]

    def of(self, source: SourceConfig) -> "DataConfig":
        """How the rows of this source are read."""
        return self if source.columns is None else self.model_copy(update={"columns": source.columns})

    def with_paths(self, changed: Callable[[str], str]) -> "DataConfig":
        """The paths of all sources changed."""

        def moved(given: Any) -> Any:
            if isinstance(given, str):
                return changed(given)
            if isinstance(given, SourceConfig):
                return given.model_copy(update={"path": changed(given.path)})
            return [moved(source) for source in given] if isinstance(given, list) else given

        return self.model_copy(update={"train": moved(self.train), "eval": moved(self.eval)})

    @model_validator(mode="after")
    def one_reader(self):
        has_columns = self.columns is not None or any(source.columns for source in self.training_sources)
        if self.format is not None and has_columns:
            raise ValueError("`columns` and `format` both say how a row is read; give one")
        return self

    @model_validator(mode="after")
    def sources_agree(self):
        weights = [source.weight for source in self.training_sources]
        if None in weights and any(weights):
            raise ValueError("train: give every source a weight, or none")
        if any(weights) and not self.shuffle:
            raise ValueError("train: weights draw at random; they do not go with shuffle: false")
        if any(source.weight is not None for source in self.evaluation_sources):
            raise ValueError("eval: a weight is for training; every row is evaluated once")
        if not isinstance(self.train, str) and (self.split or self.subset or self.revision):
            raise ValueError("split, subset and revision: give them beside the path of each source")
        for key, sources in (("train", self.training_sources), ("eval", self.evaluation_sources)):
            labels = [source.label for source in sources]
            if twice := next((label for label in labels if labels.count(label) > 1), None):
                raise ValueError(f"{key}: several sources are called {twice!r}; give each a name")
        return self
