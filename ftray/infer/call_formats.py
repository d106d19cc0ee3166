"""How models write tool calls: between which marks, and what stands there. A format per kind of chat template."""

import ast
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ftray.model.chat.template import Template

Schemas = Mapping[str, Mapping[str, Any]]  # of the functions' parameters, by name
Calls = list[tuple[str, dict[str, Any]]]  # (name, arguments)

FUNCTION = re.compile(r"\s*<function=([^>\n]+)>(.*?)(?:</function>)?\s*", re.DOTALL)
PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
ARGUMENT = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)
INVOKED = re.compile(r'<atem:parameter name="([^"]+)"[^>]*>(.*?)</atem:parameter>', re.DOTALL)
FENCED = re.compile(r"\s*```(?:json)?\s*(.*?)\s*```\s*", re.DOTALL)
NAMED_ARGUMENTS = re.compile(r"\s*([\w.-]+)(?:\[CALL_ID\]\w*)?\[ARGS\](.*)", re.DOTALL)
GEMMAS_QUOTE = '<|"|>'
SEPARATOR = "<\uff5ctool\u2581sep\uff5c>"
CONSTANTS = {"true": True, "false": False, "null": None}


@dataclass(frozen=True)
class CallFormat:
    opening: str
    closing: str  # empty: a call ends where the next one opens, or with the answer
    read: Callable[[str, Schemas], Calls | None]  # of what stands between; None: it is no call


def read_tagged(text: str, schemas: Schemas) -> Calls | None:
    """Hermes' and Qwen's JSON, Qwen3-coder's functions and parameters, GLM's keys and values."""
    if text.lstrip().startswith("{"):
        return read_json(text, schemas)
    if found := FUNCTION.fullmatch(text):
        name = found[1].strip()
        return [(name, typed_values(PARAMETER.findall(found[2]), schemas.get(name)))]
    name = text.partition("<arg_key>")[0].strip()
    if name not in schemas:
        return None
    return [(name, typed_values(ARGUMENT.findall(text), schemas.get(name)))]


def read_json(text: str, schemas: Schemas) -> Calls | None:
    """Objects with `name` and `arguments` (or `parameters`), one or a list of them."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    calls: Calls = []
    for entry in found if isinstance(found, list) else [found]:
        arguments = entry.get("arguments", entry.get("parameters", {})) if isinstance(entry, dict) else None
        if not isinstance(arguments, dict) or not isinstance(entry.get("name"), str):
            return None
        calls.append((entry["name"], arguments))
    return calls or None


def read_mistral(text: str, schemas: Schemas) -> Calls | None:
    """A list in JSON; of newer ones a name, `[ARGS]` and an object."""
    if found := NAMED_ARGUMENTS.fullmatch(text):
        return with_name(found[1], found[2])
    return read_json(text, schemas)


def read_deepseek(text: str, schemas: Schemas) -> Calls | None:
    """V3.1: a name and an object; V3 and R1: `function`, then a name, and the object in a fence."""
    name, found, rest = text.partition(SEPARATOR)
    if not found:
        return None
    if name.strip() == "function" and (fence := FENCED.fullmatch(rest.partition("\n")[2])):
        return with_name(rest.partition("\n")[0].strip(), fence[1])
    return with_name(name.strip(), rest)


def with_name(name: str, arguments: str) -> Calls | None:
    try:
        found = json.loads(arguments) if arguments.strip() else {}
    except ValueError:
        return None
    return [(name, found)] if isinstance(found, dict) else None


def read_python(text: str, schemas: Schemas) -> Calls | None:
    """LFM2's: a Python list of calls with keywords."""
    try:
        body = python_of(text.strip())
        calls = body.elts if isinstance(body, ast.List) else [body]
        return [(ast.unparse(call.func), keywords_of(call)) for call in calls if isinstance(call, ast.Call)] or None
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def python_of(text: str) -> ast.expr:
    """Raises `SyntaxError`. Line breaks within its texts are no Python, and written all the same."""
    try:
        return ast.parse(text, mode="eval").body
    except SyntaxError:
        return ast.parse(text.replace("\n", "\\n"), mode="eval").body


def keywords_of(call: ast.Call) -> dict[str, Any]:
    if call.args:
        raise ValueError("an argument without a name")
    return {str(keyword.arg): literal(keyword.value) for keyword in call.keywords}


def literal(node: ast.expr) -> Any:
    """Python's, and JSON's true, false and null."""
    if isinstance(node, ast.Name) and node.id in CONSTANTS:
        return CONSTANTS[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [literal(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        return {ast.literal_eval(key): literal(v) for key, v in zip(node.keys, node.values, strict=True) if key}
    return ast.literal_eval(node)


def read_gemma(text: str, schemas: Schemas) -> Calls | None:
    """Gemma 4's `call:NAME{key:value}`: like JSON, with bare keys and quotes of its own."""
    found = re.fullmatch(r"\s*call:([\w.-]+)(\{.*\})\s*", text, re.DOTALL)
    if found is None:
        return None
    pieces = found[2].split(GEMMAS_QUOTE)  # every second one is a text
    if len(pieces) % 2 == 0:
        return None
    bare = [re.sub(r"([{,]\s*)([^\s{}\[\],:\"]+)\s*:", r'\1"\2":', piece) for piece in pieces[::2]]
    texts = [json.dumps(piece, ensure_ascii=False) for piece in pieces[1::2]]
    joined = "".join(part for pair in zip(bare, [*texts, ""], strict=True) for part in pair)
    return with_name(found[1], joined)


def typed_values(found: list[tuple[str, str]], schema: Mapping[str, Any] | None) -> dict[str, Any]:
    """Texts as the schema's types; where it says none, texts."""
    properties = (schema or {}).get("properties")
    properties = properties if isinstance(properties, Mapping) else {}
    return {key.strip(): typed(text, properties.get(key.strip())) for key, text in found}


def typed(text: str, schema: Any) -> Any:
    kinds = schema.get("type") if isinstance(schema, Mapping) else None
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if not isinstance(kinds, list) or "string" in kinds:
        return text
    lowered = {"True": "true", "False": "false", "None": "null"}.get(text.strip(), text)  # as templates write them
    try:
        return json.loads(lowered)
    except ValueError:
        return text


# By what only its rendered calls have.
FORMATS: dict[str, CallFormat] = {
    "<|tool_call>": CallFormat("<|tool_call>", "<tool_call|>", read_gemma),
    "<|tool_call_start|>": CallFormat("<|tool_call_start|>", "<|tool_call_end|>", read_python),
    "[TOOL_CALLS]": CallFormat("[TOOL_CALLS]", "", read_mistral),
    SEPARATOR: CallFormat(
        "<\uff5ctool\u2581call\u2581begin\uff5c>", "<\uff5ctool\u2581call\u2581end\uff5c>", read_deepseek
    ),
    "<tool_call>": CallFormat("<tool_call>", "</tool_call>", read_tagged),
}


def format_of(template: Template) -> CallFormat | None:
    """In which models of this template write calls between marks; None: as JSON alone, or it has no calls."""
    return next((found for mark, found in FORMATS.items() if mark in template.rendered_call), None)


def has_messages(template: Template) -> bool:
    """A turn is several messages, each with a header that says to whom it is: gpt-oss' Harmony, and Muse Glimmer's."""
    return "<|message|>" in template.rendered_call and "to=" in template.rendered_call
