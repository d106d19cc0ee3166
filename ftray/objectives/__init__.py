"""(log-probabilities, row) -> Loss(sum, count). Pure tensor maths: no ray, no deepspeed, no ranks.

An objective is a module with a config section and an `Objective`; a line in OBJECTIVES makes it ours. A user's own is
`objective: {type: "module:NAME"}`, where NAME is an `Objective` (docs/how-to/own_code.md).
"""

from typing import Annotated

from pydantic import Discriminator, Tag

from ftray.objectives.dpo import DPO, DpoConfig
from ftray.objectives.plugin import PLUGIN, PluginConfig, tag_of
from ftray.objectives.protocol import LogProbs, Loss, LossFunction, Objective, Shape, TrainedTurns
from ftray.objectives.sft import SFT, TEXT, SftConfig, TextConfig, sft_loss
from ftray.plugins import load_plugin
from ftray.schema import Strict

# By `objective.type`.
OBJECTIVES: dict[str, Objective] = {"sft": SFT, "text": TEXT, "dpo": DPO}

ObjectiveConfig = Annotated[
    Annotated[SftConfig, Tag("sft")]
    | Annotated[TextConfig, Tag("text")]
    | Annotated[DpoConfig, Tag("dpo")]
    | Annotated[PluginConfig, Tag(PLUGIN)],
    Discriminator(tag_of),
]


def objective_of(section: Strict) -> Objective:
    """Of the section `objective` of a run."""
    if isinstance(section, PluginConfig):
        return load_plugin(section.type, Objective, key="objective.type")
    return OBJECTIVES[getattr(section, "type")]  # noqa: B009  each section has one


def trained_turns(section: Strict) -> TrainedTurns:
    """Of conversations."""
    return section.trained_turns if isinstance(section, SftConfig) else TrainedTurns()


def make_loss(section: Strict) -> LossFunction:
    if isinstance(section, PluginConfig):
        return section.loss()
    return objective_of(section).loss(section)


__all__ = [
    "OBJECTIVES",
    "LogProbs",
    "Loss",
    "LossFunction",
    "Objective",
    "ObjectiveConfig",
    "SftConfig",
    "Shape",
    "TrainedTurns",
    "make_loss",
    "objective_of",
    "sft_loss",
    "trained_turns",
]
