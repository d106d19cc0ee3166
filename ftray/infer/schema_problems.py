"""Where in a JSON schema something is that cannot guide an answer: its path, and words for the caller."""

import json
from collections.abc import Callable, Iterator
from typing import Any

from ftray.infer.protocol import StructuredOutput

MAX_TRIED = 200  # places: each is compiled by itself
# Keywords that hold schemas: one, several by name, several in order.
ONE = ("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames")
BY_NAME = ("$defs", "definitions", "properties", "patternProperties", "dependentSchemas")
IN_ORDER = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
REPLACED = {
    "oneOf constraints are not supported. Enable 'coerce_one_of' option to approximate oneOf with anyOf": (
        "oneOf: two of its branches can hold of one value; use anyOf, or branches that exclude one another"
    ),
}


def located(structure: StructuredOutput, problem: str, problem_of: Callable[[StructuredOutput], str]) -> str:
    """`problem` of the whole, with the path of the smallest part that has it, in words that name the caller's part.
    `problem_of` compiles a schema and returns what is wrong with it, or an empty text."""
    whole = json.loads(structure.text)
    shared = {key: whole[key] for key in ("$defs", "definitions") if isinstance(whole, dict) and key in whole}
    path, found, part = "", problem, whole
    for tried, (deeper, schema) in enumerate(subschemas(whole)):
        if tried >= MAX_TRIED:
            break
        if not deeper.startswith(path) or "$ref" in schema:  # what a reference leads to is a part of its own
            continue
        trouble = problem_of(StructuredOutput("json_schema", json.dumps(shared | schema)))
        if trouble and "does not exist" not in trouble:  # a reference from outside: it is cut off here
            path, found, part = deeper, trouble, schema
    name, rest = named(path, structure)
    place = f"{name} at {rest or '/'}: " if name or rest else ""
    return place + words(found, part)


def words(problem: str, schema: Any) -> str:
    lines = [line.strip() for line in problem.splitlines() if line.strip()]
    if lines and lines[0].startswith("regex parse error"):
        reason = next((line for line in lines if line.startswith("error:")), lines[-1]).removeprefix("error: ")
        pattern = schema.get("pattern") if isinstance(schema, dict) else None
        return f"the pattern {pattern!r} cannot be used: {reason}"
    first = lines[0] if lines else "it cannot be used"
    if first.startswith("Unimplemented keys: "):
        keys = ", ".join(json.loads(first.removeprefix("Unimplemented keys: ")))
        return f"{keys}: an answer cannot be held to this keyword here"
    if "integer range" in first or "number range" in first:
        bounds = ", ".join(
            f"{key} {schema[key]}"
            for key in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
            if isinstance(schema, dict) and key in schema
        )
        return f"the bounds ({bounds}) leave no number of 64 bits"
    return REPLACED.get(first, first)


def named(path: str, structure: StructuredOutput) -> tuple[str, str]:
    """The caller's name of the part that the path lies in, and the path within it."""
    fitting = [(pointer, name) for pointer, name in structure.parts if path.startswith(pointer)]
    pointer, name = max(fitting, key=lambda part: len(part[0]), default=("", ""))
    return name if len(structure.parts) > 1 else "", path[len(pointer) :]


def subschemas(schema: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema within `schema`, itself aside, by JSON pointer (RFC 6901); outer ones first,
    definitions before what refers to them."""
    if not isinstance(schema, dict):
        return
    inner: list[tuple[str, Any]] = [(key, schema[key]) for key in ONE if key in schema]
    for key in BY_NAME:
        if isinstance(schema.get(key), dict):
            inner += [(f"{key}/{escaped(name)}", entry) for name, entry in schema[key].items()]
    for key in IN_ORDER:
        if isinstance(schema.get(key), list):
            inner += [(f"{key}/{number}", entry) for number, entry in enumerate(schema[key])]
    for key, entry in sorted(inner, key=lambda item: not item[0].startswith(("$defs", "definitions"))):
        if isinstance(entry, dict):
            yield f"{path}/{key}", entry
            yield from subschemas(entry, f"{path}/{key}")


def escaped(name: str) -> str:
    return str(name).replace("~", "~0").replace("/", "~1")
