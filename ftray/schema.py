"""The base of every config object, and the value types they share."""

import os
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

NAME_RULE = "lower-case letters, digits, '.', '_' and '-', starting with a letter or digit, at most 64"
NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
BYTE_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9}


class Strict(BaseModel):
    """No unknown key, no coercion, no change after loading. The text under a field is its description."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, protected_namespaces=(), use_attribute_docstrings=True
    )


def check_name(name: str) -> str:
    if not NAME_PATTERN.fullmatch(name):
        raise ValueError(f"a name is {NAME_RULE}")
    return name


def parse_bytes(value: Any) -> int:
    """`2GiB` -> 2147483648. A bare number is refused: its unit would be a guess."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]+)", value) if isinstance(value, str) else None
    if match is None or match[2] not in BYTE_UNITS:
        raise ValueError(f"a size is a number and a unit ({', '.join(BYTE_UNITS)}), such as 2GiB")
    return int(float(match[1]) * BYTE_UNITS[match[2]])


def expanded(place: str) -> str:
    """A path with the home directory for `~`. Raises ValueError for what would become a directory of that name."""
    if re.match(r"\$\w|\$\{", place):
        raise ValueError("variables of the environment are not read here; write the path out (~ is your home)")
    if not place.startswith("~"):
        return place
    path = os.path.expanduser(place)
    if path.startswith("~"):
        raise ValueError(f"there is no user {place.partition('/')[0][1:]!r}; write the path out (~ is your home)")
    return path


Name = Annotated[str, AfterValidator(check_name)]
# Written as it is read, so that a dumped config can be loaded again.
ByteSize = Annotated[
    int,
    BeforeValidator(parse_bytes, json_schema_input_type=str),
    PlainSerializer(lambda size: f"{size}B", when_used="json"),
]
Text = Annotated[str, Field(min_length=1)]
Place = Annotated[Text, AfterValidator(expanded)]  # a path, or a URL or name, which stay as they are
PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
