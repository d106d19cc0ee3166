"""The section `data` of a run: sources, columns, what happens to rows that are too long."""

from typing import Literal

from pydantic import Field, model_validator

from ftray.plugins import PluginName
from ftray.schema import Place, Strict, Text


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


class DataConfig(Strict):
    train: Place
    """File (.jsonl .json .csv .parquet), `save_to_disk` directory, or hub id."""
    eval: Place | None = None
    revision: Text | None = None
    """Of a hub id."""
    columns: ColumnsConfig | None = None
    """None: `messages`, or `prompt` and `completion`, as the file has them."""
    format: PluginName | None = None
    """module:NAME of a `Format` of one's own, which reads a row; instead of `columns`."""
    transform: PluginName | None = None
    """module:NAME of a function of one's own: a row in, the row to be read out, or None to drop it."""
    max_example_tokens: int = Field(default=2048, ge=2)
    overlong: Literal["error", "truncate", "drop", "split"] = "error"
    """split: documents (objective text) only."""
    shuffle: bool = True

    @model_validator(mode="after")
    def one_reader(self):
        if self.format is not None and self.columns is not None:
            raise ValueError("`columns` and `format` both say how a row is read; give one")
        return self
