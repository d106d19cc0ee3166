"""`NAME`, `NAME@VERSION` and `NAME@ALIAS`."""

import re
from dataclasses import dataclass

from ftray.errors import UserError
from ftray.schema import NAME_PATTERN, NAME_RULE

DEFAULT_ALIAS = "prod"
TAG_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=-]{0,63}")
ALIAS_PATTERN = re.compile(r"[a-z][a-z0-9_-]{0,31}")


@dataclass(frozen=True)
class Reference:
    name: str
    number: int | None = None  # a version, or
    alias: str | None = None  # an alias: exactly one of the two

    def __str__(self) -> str:
        return f"{self.name}@{self.number if self.alias is None else self.alias}"


def parse_reference(text: str) -> Reference:
    """`support@3` is a version, `support@prod` an alias, `support` means `support@prod`."""
    name, at, selector = text.partition("@")
    if not NAME_PATTERN.fullmatch(name):
        raise UserError(f"{text!r}: an adapter name is {NAME_RULE}")
    if not at:
        return Reference(name, alias=DEFAULT_ALIAS)
    if re.fullmatch(r"[1-9]\d{0,8}", selector):
        return Reference(name, number=int(selector))
    return Reference(name, alias=check_alias(selector, text))


def check_tag(tag: str) -> None:
    if not TAG_PATTERN.fullmatch(tag):
        raise UserError(f"{tag!r}: a tag is letters, digits, '.', '_', '-' and '=', 64 at most")


def check_alias(alias: str, where: str) -> str:
    if not ALIAS_PATTERN.fullmatch(alias):
        raise UserError(
            f"{where!r}: after '@' comes a version number or an alias (lower-case letters, digits, '_', '-')"
        )
    return alias
