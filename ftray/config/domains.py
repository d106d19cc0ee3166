"""What a sweep may choose for one key: choices, a range, or an expression of other keys."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ftray.config.expression import Expression

RANGES = ("uniform", "log_uniform", "int_uniform", "log_int_uniform")
SHAPES = (
    f"a list of choices, {{{RANGES[0]}: [LOW, HIGH]}} (or {', '.join(RANGES[1:])}; with points: N for a grid), "
    "or {expression: TEXT}"
)


@dataclass(frozen=True)
class Choice:
    values: tuple[Any, ...]

    @property
    def grid(self) -> list[Any]:
        return list(self.values)

    @property
    def extremes(self) -> list[Any]:
        """Values that stand for all: what the run's schema refuses among them is refused before anything starts."""
        return list(self.values)


@dataclass(frozen=True)
class Range:
    low: float
    high: float
    is_log: bool
    is_int: bool
    points: int | None = None  # of a grid

    @property
    def grid(self) -> list[Any]:
        assert self.points is not None
        if self.points == 1:
            return [self.low]
        shares = [i / (self.points - 1) for i in range(self.points)]
        if self.is_log:
            values = [self.low * (self.high / self.low) ** share for share in shares]
        else:
            values = [self.low + (self.high - self.low) * share for share in shares]
        # Six digits, so that a rate can be read and typed; the ends stay as they were written.
        values = [self.low, *(float(f"{value:.6g}") for value in values[1:-1]), self.high]
        return list(dict.fromkeys(round(value) for value in values)) if self.is_int else values

    @property
    def extremes(self) -> list[Any]:
        return [self.low, self.high]


Domain = Choice | Range | Expression


def parse_domain(value: Any) -> Domain:
    """Raises ValueError with the rule."""
    if isinstance(value, (Choice, Range, Expression)):
        return value
    if isinstance(value, list):
        if not value:
            raise ValueError("a list of choices must not be empty")
        if len({repr(item) for item in value}) < len(value):
            raise ValueError("the same choice is there twice")
        return Choice(tuple(value))
    if not isinstance(value, dict) or len(value.keys() & {*RANGES, "expression"}) != 1:
        raise ValueError(f"give {SHAPES}")
    if "expression" in value:
        if len(value) > 1 or not isinstance(value["expression"], (str, int, float)):
            raise ValueError("an expression stands alone, such as {expression: 2 * adapter.rank}")
        return Expression(str(value["expression"]))
    return parse_range(value)


def parse_range(value: dict[str, Any]) -> Range:
    kind = next(name for name in RANGES if name in value)
    if unknown := sorted(value.keys() - {kind, "points"}):
        raise ValueError(f"{unknown[0]!r} is not understood; give {SHAPES}")
    ends, points = value[kind], value.get("points")
    if not isinstance(ends, list) or len(ends) != 2 or not all(is_number(end) for end in ends):
        raise ValueError(f"{kind} takes [LOW, HIGH], two numbers")
    low, high = ends
    is_log, is_int = kind.startswith("log"), "int" in kind
    if is_int and not all(isinstance(end, int) for end in ends):
        raise ValueError(f"{kind} takes whole numbers")
    if not low < high:
        raise ValueError(f"{kind}: LOW ({low:g}) must be below HIGH ({high:g})")
    if is_log and low <= 0:
        raise ValueError(f"{kind}: LOW ({low:g}) must be above 0")
    if points is not None and (not isinstance(points, int) or isinstance(points, bool) or points < 1):
        raise ValueError("points: a whole number from 1 on")
    return Range(low, high, is_log, is_int, points)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def as_yaml(domain: Domain) -> Any:
    """As it was written."""
    if isinstance(domain, Choice):
        return list(domain.values)
    if isinstance(domain, Expression):
        return {"expression": domain.text}
    kind = f"{'log_' if domain.is_log else ''}{'int_' if domain.is_int else ''}uniform"
    points = {} if domain.points is None else {"points": domain.points}
    return {kind: [domain.low, domain.high], **points}


def expression_order(space: dict[str, Domain]) -> Sequence[str]:
    """The keys of expressions, each after those that it needs. Raises ValueError where they need each other."""
    waiting = {key: domain for key, domain in space.items() if isinstance(domain, Expression)}
    order: list[str] = []
    while waiting:
        ready = [key for key, domain in waiting.items() if not waiting.keys() & set(domain.keys)]
        if not ready:
            raise ValueError(f"the expressions of {', '.join(waiting)} need each other")
        order += ready
        for key in ready:
            del waiting[key]
    return order
