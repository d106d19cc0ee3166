"""JSON schemas of the config files, for editors: completion, and a mark under a wrong key while it is typed.

A field's description is the text under it in the source. What one field says about another no schema
holds: `ftray` itself checks that before it starts.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ftray.config.domains import RANGES
from ftray.config.load import KINDS
from ftray.config.run import RunConfig
from ftray.config.sweep import why_not_swept

SCHEMAS = Path(__file__).parent / "schemas"  # as they are shipped: `python -m ftray.config.editor` writes them
DIALECT = "http://json-schema.org/draft-07/schema#"  # what VS Code's YAML extension knows
# What a sweep may choose for a key (`domains.parse_domain`).
PAIR = {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}
DOMAIN = {
    "anyOf": [
        {"type": "array", "minItems": 1},
        {
            "type": "object",
            "properties": {**dict.fromkeys(RANGES, PAIR), "points": {"type": "integer", "minimum": 1}},
            "additionalProperties": False,
        },
        {
            "type": "object",
            "properties": {"expression": {"type": ["string", "number"]}},
            "required": ["expression"],
            "additionalProperties": False,
        },
    ]
}


def json_schema(kind: str) -> dict[str, Any]:
    model = KINDS[kind]
    schema: dict[str, Any] = {"$schema": DIALECT, **model.model_json_schema()}
    for described in (schema, *schema.get("$defs", {}).values()):
        drop_titles(described)
    if kind == "sweep":
        schema["$defs"]["Domain"] = DOMAIN
        domain, run_keys = {"$ref": "#/$defs/Domain"}, dotted_keys(RunConfig)
        schema["properties"]["space"] = {
            "type": "object",
            "minProperties": 1,
            "properties": {key: domain for key in run_keys if why_not_swept(key) is None},
            "patternProperties": {r"^variables\.": domain},
            "additionalProperties": False,
        }
        schema["properties"]["overrides"] = {"type": "object", "properties": {key: {} for key in run_keys}}
        schema["properties"]["seeds"] = {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "array", "minItems": 1}]}
    return schema


def drop_titles(schema: dict[str, Any]) -> None:
    """They say the names once more."""
    for field in schema.get("properties", {}).values():
        field.pop("title", None)
    schema.pop("title", None)


def sections(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for field in model.model_fields.values():
        yield from classes_in(field.annotation)


def classes_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in getattr(annotation, "__args__", ()):
        yield from classes_in(part)


def dotted_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """A run's keys, sections among them, as spaces and overrides name them."""
    found = []
    for name, field in model.model_fields.items():
        found.append(f"{prefix}{name}")
        for nested in classes_in(field.annotation):
            found += dotted_keys(nested, f"{prefix}{name}.")
    return list(dict.fromkeys(found))


def write_schemas() -> None:
    SCHEMAS.mkdir(exist_ok=True)
    for kind in KINDS:
        (SCHEMAS / f"{kind}.json").write_text(json.dumps(json_schema(kind), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_schemas()
