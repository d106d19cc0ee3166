"""The section `chat`: how conversations are rendered, in training and in serving."""

import datetime
import difflib
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, field_validator

from ftray.schema import Strict, expanded

NAMED_TEMPLATES = ("alpaca", "chatml", "gemma", "llama3", "mistral")
IS_JINJA = re.compile(r"\{[{%]")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
RENDERERS_OWN = ("messages", "tools", "add_generation_prompt", "bos_token", "eos_token")


def read_template(given: str) -> str:
    """A file's text takes its place: other machines need it too, and another text is another run."""
    if given in NAMED_TEMPLATES or IS_JINJA.search(given):
        return given
    path = Path(expanded(given))
    named = f"one of {', '.join(NAMED_TEMPLATES)}"
    if not path.is_file():
        near = difflib.get_close_matches(given.lower(), NAMED_TEMPLATES, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; give {named}, or a file with a Jinja template"
        raise ValueError(f"{given}: no such file{hint}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{given}: cannot be read: {error}") from None
    if not IS_JINJA.search(text):
        raise ValueError(f"{given}: holds no Jinja template; give {named}, or a file with one")
    return text


def check_date(text: str) -> str:
    try:
        datetime.date.fromisoformat(text)
    except ValueError:
        raise ValueError("a date is YYYY-MM-DD") from None
    return text


class ChatConfig(Strict):
    template: Annotated[str, Field(min_length=1), AfterValidator(read_template)] | None = None
    """alpaca, chatml, gemma, llama3, mistral, or a file with a Jinja template; null: the base model's own."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Variables that the template reads, such as enable_thinking: false."""
    date: Annotated[str, AfterValidator(check_date)] | None = None
    """The day (YYYY-MM-DD) that a dated template writes; null: the day on which the run began."""

    def __hash__(self) -> int:
        return hash(self.model_dump_json())

    @field_validator("arguments")
    @classmethod
    def are_variables(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        for name in arguments:
            if name in RENDERERS_OWN:
                raise ValueError(f"{name} is given by ftray; it cannot be an argument")
            if not VARIABLE.fullmatch(name):
                raise ValueError(f"{name!r} is no name of a variable")
        return arguments
