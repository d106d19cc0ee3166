"""A caller's JSON schema, made ready to guide an answer: what constrains nothing goes, objects that list their keys are
closed, references of a tool's schema stay its own."""

from typing import Any

from ftray.infer.schema_problems import BY_NAME, IN_ORDER, ONE, subschemas

# Formats of the JSON schema standard (2020-12, section 7.3). A name that is none of them is a hint to people
# ("password", "int64"), and any value has it.
FORMATS = frozenset(
    {
        *("date-time", "date", "time", "duration", "email", "idn-email", "hostname", "idn-hostname", "ipv4", "ipv6"),
        *("uri", "uri-reference", "iri", "iri-reference", "uuid", "uri-template"),
        *("json-pointer", "relative-json-pointer", "regex"),
    }
)
SAYS_MORE = ("additionalProperties", "patternProperties", "unevaluatedProperties")
COMPOSED = ("allOf", "anyOf", "oneOf", "$ref", "if", "not")


def ready(schema: Any, *, closed: bool) -> Any:
    """A copy. `closed`: an object has the keys that it lists and no others, where nothing in the schema says more."""
    return cleaned(schema, closed=closed and not joins_objects(schema))


def cleaned(schema: Any, *, closed: bool) -> Any:
    if not isinstance(schema, dict):
        return schema
    copy: dict[str, Any] = {}
    for key, value in schema.items():
        if key in BY_NAME and isinstance(value, dict):
            copy[key] = {name: cleaned(part, closed=closed) for name, part in value.items()}
        elif key in IN_ORDER and isinstance(value, list):
            copy[key] = [cleaned(part, closed=closed) for part in value]
        else:
            copy[key] = cleaned(value, closed=closed) if key in ONE else value
    if isinstance(copy.get("format"), str) and copy["format"] not in FORMATS:
        del copy["format"]
    # True is a wish that no grammar can hold; whoever reads a set joins what is equal.
    if isinstance(copy.get("uniqueItems"), bool):
        del copy["uniqueItems"]
    if closed and copy.get("properties") and not any(key in copy for key in SAYS_MORE):
        copy["additionalProperties"] = False
    return copy


def joins_objects(schema: Any) -> bool:
    """Several parts each tell some keys of one object: none of them may forbid the others'."""
    parts = [schema, *(part for _, part in subschemas(schema))] if isinstance(schema, dict) else []
    return any(
        len(part.get("allOf", ())) > 1 or ("properties" in part and any(key in part for key in COMPOSED))
        for part in parts
    )


def under(schema: Any, pointer: str) -> Any:
    """A copy to stand at `pointer` of a larger schema: what it calls `#` is its own place. One with an `$id` has a
    place of its own anyway."""
    if isinstance(schema, list):
        return [under(item, pointer) for item in schema]
    if not isinstance(schema, dict) or "$id" in schema:
        return schema
    return {
        key: f"#{pointer}{item[1:]}" if key == "$ref" and is_local(item) else under(item, pointer)
        for key, item in schema.items()
    }


def is_local(reference: Any) -> bool:
    return isinstance(reference, str) and (reference == "#" or reference.startswith("#/"))
