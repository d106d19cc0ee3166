"""`kind: pipeline`: from run files to a published adapter, behind conditions on what was measured."""

from typing import Any, Literal

from pydantic import Field, model_validator

from ftray.config.expression import Expression
from ftray.schema import Name, Place, Strict, Text

MODELS = ("base", "tuned")
MEASURES = {
    "accuracy": "exact match on data.eval of the last run",
    "loss": "per trained token of data.eval of the last run",
    "general_loss": "per token of general_text",
}


class PublishConfig(Strict):
    name: Name
    """In the registry of the last run."""
    alias: Name | None = None
    """Moved to the version, such as prod."""


class PipelineConfig(Strict):
    kind: Literal["pipeline"]
    name: Name
    train: list[Text] = Field(min_length=1)
    """Run or sweep files; each goes on from the result of the one before."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Of the keys of all these runs."""
    general_text: Place | None = None
    """Rows of plain text: the loss on them tells what tuning has broken."""
    require: list[Text] = Field(default_factory=list)
    """Conditions such as tuned.accuracy >= base.accuracy + 0.1."""
    publish: PublishConfig | None = None
    """Where all conditions hold; null: nothing is published."""

    @model_validator(mode="after")
    def agree(self):
        known = [f"{model}.{measure}" for model in MODELS for measure in MEASURES]
        for number, text in enumerate(self.require):
            try:
                condition = Expression(text)
                keys = condition.keys
            except ValueError as error:
                raise ValueError(f"require.{number}: {error}") from None
            for key in keys:
                if key not in known:
                    raise ValueError(f"require.{number}: {text!r}: {key} is not measured; there are {', '.join(known)}")
            if not keys or not isinstance(condition.evaluate(lambda key: 1.0), bool):
                raise ValueError(f"require.{number}: {text!r} is no condition on what is measured")
        if self.general_text is None and any("general_loss" in text for text in self.require):
            raise ValueError("require: general_loss is measured on general_text, which is not given")
        return self
