"""`python docs/generate.py`: the pages that are made from the code and from kept measurements. A test checks that they
are current."""

import ast
import functools
import json
import sys
from pathlib import Path
from typing import Any

import typer

sys.path.insert(0, str(Path(__file__).parents[1]))

from ftray.cli.main import app
from ftray.config.editor import json_schema
from ftray.config.load import KINDS

DOCS = Path(__file__).parent
ROOT, BENCHMARKS = DOCS.parent, DOCS / "benchmarks"
WHAT = {"run": "`ftray train`", "sweep": "`ftray sweep`", "serve": "`ftray serve`", "pipeline": "`ftray pipeline`"}


def config_page() -> str:
    parts = [
        "# Config keys\n",
        "Made from the schemas by `python docs/generate.py`. Each can be given as `key.path=value` after the file.\n",
    ]
    for kind in KINDS:
        schema = json_schema(kind)
        parts.append(f"## kind: {kind}\n\nFor {WHAT[kind]}.\n\n| key | type | default | |\n|---|---|---|---|")
        parts += rows(schema, schema.get("$defs", {}), "")
        parts.append("")
    return "\n".join(parts)


def rows(schema: dict[str, Any], definitions: dict[str, Any], prefix: str) -> list[str]:
    found = []
    for name, field in schema.get("properties", {}).items():
        key = f"{prefix}{name}"
        sections = [definitions[ref] for ref in refs_of(field) if definitions.get(ref, {}).get("properties")]
        text = field.get("description", "").replace("|", "\\|")
        default = f"`{json.dumps(field['default'])}`" if "default" in field and not sections else ""
        required = "required" if name in schema.get("required", []) else default
        found.append(f"| `{key}` | {type_of(field, definitions)} | {required} | {text} |")
        for section in sections:
            kind = section["properties"].get("type", {}).get("const")
            label = f"{key}[{kind}]" if kind is not None and len(sections) > 1 else key
            found += rows(section, definitions, f"{label}.")
    return found


def refs_of(field: dict[str, Any]) -> list[str]:
    arms = [field, *field.get("anyOf", []), *field.get("oneOf", []), *field.get("allOf", [])]
    return [arm["$ref"].rpartition("/")[2] for arm in arms if "$ref" in arm]


def type_of(field: dict[str, Any], definitions: dict[str, Any]) -> str:
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return " ".join(f"`{value}`" for value in field["enum"])
    arms = field.get("anyOf") or field.get("oneOf")
    if arms:
        return ", ".join(dict.fromkeys(type_of(arm, definitions) for arm in arms))
    if refs_of(field):
        return "section"
    kind = field.get("type", "value")
    limits = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = " ".join(f"{sign} {field[key]}" for key, sign in limits.items() if key in field)
    return f"{kind} {bounds}".strip()


def cli_page() -> str:
    root = typer.main.get_command(app)
    parts = ["# Commands\n", "Made from the code by `python docs/generate.py`. `ftray COMMAND --help` says the same.\n"]
    for path, command in commands_of(root, "ftray"):
        parts.append(f"## {path}\n\n{(command.help or '').strip()}\n")
        if command.epilog:
            parts.append(f"```\n{command.epilog.removeprefix('Example: ')}\n```\n")
        arguments = [row(parameter) for parameter in command.params if not getattr(parameter, "hidden", False)]
        arguments = [line for line in arguments if line and "--help" not in line]
        if arguments:
            parts.append("| | |\n|---|---|\n" + "\n".join(arguments) + "\n")
    return "\n".join(parts)


def commands_of(command: Any, path: str) -> list[tuple[str, Any]]:
    if not hasattr(command, "commands"):
        return [(path, command)]
    children = [(name, command.commands[name]) for name in command.list_commands(None)]  # in the order of --help
    return [found for name, child in children for found in commands_of(child, f"{path} {name}")]


def row(parameter: Any) -> str:
    name = parameter.make_metavar_name() if hasattr(parameter, "make_metavar_name") else ""
    if parameter.param_type_name == "argument":
        name = (parameter.metavar or parameter.name.upper()) + ("" if parameter.required else " (optional)")
    else:
        name = ", ".join(parameter.opts)
    text = " ".join((getattr(parameter, "help", None) or "").split()).replace("|", "\\|")
    return f"| `{name}` | {text} |"


def benchmark_page(path: Path) -> str:
    """Of what `jobs/bench.py` has kept: what each side is, how it was run, and its medians."""
    kept = json.loads(path.read_text(encoding="utf-8"))
    command = f"python jobs/bench.py {kept['bench']}"
    versions = ", ".join(f"{name} {version}" for name, version in kept["versions"].items())
    parts = [
        f"# Benchmark: {path.stem}\n",
        f"`{command}`, {kept['date']}. Hardware: {kept['hardware']}. Versions: {versions}.\n",
        f"Every turn is in [{path.name}]({path.name}), from which `python docs/generate.py` makes this page.",
        "[All benchmarks](index.md)\n",
    ]
    sides = kept["median"]
    parts += [f"- **{side}**: {what_it_is(side)}" for side in sides]
    names = list(dict.fromkeys(name for figures in sides.values() for name in figures))
    parts += ["", "| median | " + " | ".join(sides) + " |", "|---" * (len(sides) + 1) + "|"]
    for name in names:
        cells = [figure(figures.get(name)) for figures in sides.values()]
        parts.append(f"| {name} | " + " | ".join(cells) + " |")
    if ratios := kept.get("ratios_of_tokens_per_s"):
        parts += [
            "",
            "| ratio of tokens/s | |",
            "|---|---|",
            *(f"| {pair} | {value:g} |" for pair, value in ratios.items()),
        ]
    return "\n".join(parts) + "\n"


def what_it_is(side: str) -> str:
    tree = ast.parse((ROOT / "jobs" / "bench_sides" / f"{side}.py").read_text(encoding="utf-8"))
    return " ".join((ast.get_docstring(tree) or "").split())


def figure(value: float | str | None) -> str:
    return "-" if value is None else f"{value:,.6g}" if isinstance(value, float | int) else str(value)


def benchmarks() -> list[Path]:
    """Those with sides."""
    return [path for path in sorted(BENCHMARKS.glob("*.json")) if "median" in json.loads(path.read_text())]


# By path below docs/.
PAGES = {"reference/config.md": config_page, "reference/cli.md": cli_page} | {
    f"benchmarks/{path.stem}.md": functools.partial(benchmark_page, path) for path in benchmarks()
}


def main() -> None:
    for name, make in PAGES.items():
        (DOCS / name).write_text(make(), encoding="utf-8")
        print(f"written: docs/{name}")


if __name__ == "__main__":
    main()
