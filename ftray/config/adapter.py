"""The section `adapter` of a run."""

import re
from typing import Literal

from pydantic import Field, model_validator

from ftray.errors import AdapterError
from ftray.schema import Place, PositiveFloat, PositiveInt, Strict, Text


class AdapterConfig(Strict):
    variant: Literal["lora", "rslora", "dora"] = "lora"
    rank: PositiveInt = 16
    alpha: PositiveFloat = 32
    targets: Literal["all-linear"] | list[Text] = "all-linear"
    """Names or regular expressions of linear modules."""
    experts: bool = False
    """Of a mixture: LoRA on each of them too, with this rank. Their router stays frozen."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Step losses agree across worker counts only at 0."""
    rank_pattern: dict[str, PositiveInt] = Field(default_factory=dict)
    """By regular expression of the module's name."""
    alpha_pattern: dict[str, PositiveFloat] = Field(default_factory=dict)
    initialization: Literal["default", "pissa"] = "default"
    init_from: Place | None = None
    """NAME@N, NAME@ALIAS or a PEFT directory: goes on from its weights."""
    modules_to_save: list[Text] = Field(default_factory=list)
    """Trained whole beside LoRA, such as embed_tokens."""
    train_tokens: list[Text] = Field(default_factory=list)
    """Tokens of the tokenizer whose embedding is trained too, such as new ones."""
    quantize_base: Literal["nf4"] | None = None
    """QLoRA (Dettmers et al. 2023): the frozen base in 4 bits."""

    @model_validator(mode="after")
    def agree(self):
        if self.initialization == "pissa":
            for key in ("quantize_base", "init_from"):
                if getattr(self, key) is not None:
                    raise ValueError(f"initialization pissa changes the base weights, so it does not go with {key}")
            if self.variant == "dora":
                raise ValueError("initialization pissa does not go with variant dora")
            for key in ("modules_to_save", "train_tokens"):
                if getattr(self, key):
                    raise ValueError(f"initialization pissa does not go with {key}")
        if self.experts:
            for key, plain in (("variant", ("lora", "rslora")), ("initialization", ("default",)), ("dropout", (0,))):
                if getattr(self, key) not in plain:
                    raise ValueError(f"experts do not go with {key}: {getattr(self, key)}")
            for key in ("rank_pattern", "alpha_pattern"):
                if getattr(self, key):
                    raise ValueError(f"experts have one rank and alpha; {key} does not go with them")
        return self


def target_pattern(target: str) -> re.Pattern[str]:
    """Matches in full the names of modules that end, after a dot, in what `target` matches."""
    try:
        return re.compile(rf"(.*\.)?({target})")
    except re.error as error:
        raise AdapterError(f"adapter.targets: {target!r} is no regular expression: {error}") from None
