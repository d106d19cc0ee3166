"""A user's own objective: `objective: {type: "module:NAME", ...}`; its own section reads the other keys."""

import traceback
from typing import Any

from pydantic import ConfigDict, ValidationError, model_validator

from ftray.errors import UserError
from ftray.objectives.protocol import LogProbs, Loss, LossFunction, Objective, Row
from ftray.plugins import PluginName, is_plugin, load_plugin
from ftray.schema import Strict

MISTAKES = (ArithmeticError, AttributeError, LookupError, NameError, TypeError, ValueError)
PLUGIN = "module:NAME"


class PluginConfig(Strict):
    """An `Objective` of one's own, by module and name."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)
    type: PluginName

    @model_validator(mode="after")
    def reads_its_keys(self):
        try:
            self.own_section()
        except UserError as error:
            raise ValueError(str(error)) from None
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        return self

    def own_section(self) -> Strict:
        objective = load_plugin(self.type, Objective, key="objective.type")
        return objective.config.model_validate({"type": self.type, **(self.model_extra or {})})

    def loss(self) -> LossFunction:
        """Its mistakes are the same on every try: a `UserError`, for which no worker starts again."""
        loss = load_plugin(self.type, Objective, key="objective.type").loss(self.own_section())

        def checked(log_probs: LogProbs, row: Row) -> Loss:
            try:
                found = loss(log_probs, row)
            except MISTAKES as error:
                place = traceback.extract_tb(error.__traceback__)[-1]
                raise UserError(
                    f"objective.type: {self.type}: {type(error).__name__}: {error} ({place.filename}:{place.lineno})"
                ) from error
            if not isinstance(found, Loss):
                raise UserError(f"objective.type: {self.type}: returned {type(found).__name__}, and must return a Loss")
            return found

        return checked


def tag_of(section: Any) -> Any:
    """Which arm reads a section: the plugin's, or the one that its `type` names."""
    kind = section.get("type") if isinstance(section, dict) else getattr(section, "type", None)
    return PLUGIN if isinstance(kind, str) and is_plugin(kind) else kind
