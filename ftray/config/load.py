"""Reading a config file: YAML 1.2, then `key.path=value` overrides, then the schema. Every problem in one report."""

import difflib
import io
import json
import typing
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import YAMLError

from ftray.config.pipeline import PipelineConfig
from ftray.config.renamed import KEYS, RenamedWarning, of_other_tools, old_names, with_new_names
from ftray.config.run import RunConfig
from ftray.config.serve import ServeConfig
from ftray.config.sweep import SweepConfig
from ftray.errors import ConfigError
from ftray.objectives.plugin import PLUGIN

KINDS: dict[str, type[BaseModel]] = {
    "run": RunConfig,
    "serve": ServeConfig,
    "sweep": SweepConfig,
    "pipeline": PipelineConfig,
}


def load_config(path: str | Path, overrides: Sequence[str] = (), *, kind: str) -> Any:
    """Returns the frozen config object of `kind`; raises `ConfigError` with every problem found."""
    path = Path(path)
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(str(path), [f"no such file{hint}"])
    return parse_config(path.read_text(encoding="utf-8"), overrides, kind=kind, source=str(path))


def parse_config(text: str, overrides: Sequence[str] = (), *, kind: str, source: str) -> Any:
    tree = read_yaml(text, source=source)
    if not isinstance(tree, dict):
        raise ConfigError(source, ["the file must be a mapping of keys to values"])
    notes = old_names_given(tree, overrides, kind=kind)
    if kind == "run":
        try:
            tree = with_new_names(tree)  # before the overrides, which replace what the file has by either name
        except ValueError as error:
            raise ConfigError(source, [str(error)]) from None
    problems = [problem for item in overrides if (problem := apply_override(tree, item))]
    keep_the_given_length(tree, overrides)
    found = tree.get("kind")
    if found != kind:
        if found in KINDS:  # what else is wrong with it follows from that
            command = "train" if found == "run" else found
            raise ConfigError(source, [f"kind: {found!r} must be {kind!r}; this is a file for `ftray {command}`"])
        problems.append(f"kind: {found!r} must be {kind!r}")
        tree = {**tree, "kind": kind}
    for line in notes:
        warnings.warn(f"{source}: {line}", RenamedWarning, stacklevel=2)
    model = KINDS[kind]
    config = None
    try:
        config = model.model_validate(tree)
    except ValidationError as error:
        problems += [problem + blamed_override(problem, overrides) for problem in problems_in(model, error)]
    if problems or config is None:
        raise ConfigError(source, problems)
    return config


def old_names_given(tree: dict[str, Any], overrides: Sequence[str], *, kind: str) -> list[str]:
    """A line for each old name of a run's key or value, in the file or in an override."""
    if kind == "sweep":
        given = [section for key in ("space", "overrides") if isinstance(section := tree.get(key), dict)]
    elif kind == "run":
        settings: dict[str, Any] = {}
        for path, _, value in (item.partition("=") for item in overrides):
            settings[path] = value
            if path.count(".") == 1 and path not in KEYS:
                section, key = path.split(".")
                settings[section] = {key: value}
        given = [tree, settings]
    else:
        given = []
    return list(dict.fromkeys(line for section in given for line in old_names(section)))


def read_yaml(text: str, *, source: str) -> Any:
    try:
        return YAML(typ="safe", pure=True).load(text)
    except DuplicateKeyError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise ConfigError(source, [f"line {line}: {str(error.problem).split(' with value')[0]}"]) from None
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError(source, [f"{where}not valid YAML: {getattr(error, 'problem', None) or error}"]) from None


def apply_override(tree: dict, item: str) -> str | None:
    """Sets one `key.path=value` in place (the value is read as YAML); returns the problem, if there is one."""
    path, equals, text = item.partition("=")
    if not equals or not path:
        return f"override {item!r}: write it as key.path=value"
    try:
        value = YAML(typ="safe", pure=True).load(text)
    except YAMLError:
        return f"override {item!r}: the value is not valid YAML"
    try:
        set_at(tree, path, value)
    except ValueError as error:
        return f"override {item!r}: {str(error).partition(': ')[2]}"
    return None


def set_at(tree: dict[str, Any], key: str, value: Any) -> None:
    """By the key's new name. Raises ValueError where a parent is a value. A section that is null is made anew."""
    *parents, last = KEYS.get(key, key).split(".")
    if parents[:1] == ["space"]:  # whose keys are paths themselves: space.optimizer.learning_rate
        parents, last = parents[:1], key.partition(".")[2]
    for parent in parents:
        if tree.get(parent) is None:
            tree[parent] = {}
        tree = tree[parent]
        if not isinstance(tree, dict):
            raise ValueError(f"{key}: {parent} is a value, not a section")
    tree[last] = value


def problems_in(model: type[BaseModel], error: ValidationError) -> list[str]:
    """One line each; rules between sections may find several at once. Of a value that none of several kinds takes, what
    each wants is one line."""
    found: dict[tuple[str, str], list[str]] = {}
    for item in error.errors():
        key = ".".join(walk(model, item["loc"])[0])
        lines = describe_problem(model, item).splitlines()
        of_value = found.setdefault((key, repr(item["input"])), [])
        if of_value and " is refused: " in lines[0] and " is refused: " in of_value[-1]:
            of_value[-1] += f"; or: {lines[0].partition(' is refused: ')[2]}"
        else:
            of_value += lines
    return [line for lines in found.values() for line in lines]


# One of them says how long a run is.
LENGTHS = ("epochs", "max_steps")


def keep_the_given_length(tree: dict, overrides: Sequence[str]) -> None:
    """`max_steps=5` on the command line stands for the file's `epochs`, and the other way round."""
    given = [key for key in LENGTHS if any(item.startswith(f"{key}=") for item in overrides)]
    if len(given) == 1 and tree.get(given[0]) is not None:
        for key in LENGTHS:
            if key != given[0]:
                tree.pop(key, None)


def blamed_override(problem: str, overrides: Sequence[str]) -> str:
    """The override that a problem's key was given with, if it was."""
    key = problem.partition(":")[0]
    for item in reversed(overrides):
        path = item.partition("=")[0]
        if f"{key}.".startswith(f"{path}.") and path:
            return f" (override {item})"
    return ""


def describe_problem(model: type[BaseModel], item: Any) -> str:
    """One pydantic error as `key: value, rule, fix`."""
    location, fields = walk(model, item["loc"])
    key = ".".join(location) or "file"
    value = item["input"]
    if item["type"] == "extra_forbidden":
        hint = of_other_tools(location[-1])
        if hint is None:
            near = difflib.get_close_matches(location[-1], fields, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys here: {', '.join(sorted(fields))}"
        return f"{key}: unknown key; {hint}"
    if item["type"] == "missing":
        return f"{key}: required, but not given"
    if item["type"] == "union_tag_not_found":
        if not isinstance(value, dict):
            return f"{key}: {value!r} is refused: give a section, such as {key}={{type: {value}}}"
        return f"{key}: type is required, but not given"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error" and isinstance(value, dict):
        return f"{key}: {message}" if location else message
    choices = ""
    if item["type"] == "literal_error":
        choices = item["ctx"]["expected"]
    elif item["type"] == "union_tag_invalid":
        key, value, choices = f"{key}.type", item["ctx"]["tag"], item["ctx"]["expected_tags"]
        message = f"Input should be {choices}"
    hint = ""
    if choices and isinstance(value, str):
        names = choices.replace("'", "").replace(" or ", ", ").split(", ")
        near = difflib.get_close_matches(value, names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{key}: {value!r} is refused: {message}{hint}"


def walk(model: type[BaseModel], parts: Sequence[Any]) -> tuple[list[str], list[str]]:
    """The keys of a pydantic location, without the names it adds for the arms of unions, and the fields that exist
    beside the last of them."""
    keys: list[str] = []
    here: Any = model  # what the key before led to
    beside: list[str] = []
    for part in parts:
        if part in SHAPES_OF_SOURCES:
            continue
        arms = models_in(here)
        tagged = next((arm for arm in arms if len(arms) > 1 and tag_of(arm) == part), None)
        if tagged is not None:  # `objective.dpo.beta`: dpo is no key
            here = tagged
            continue
        if isinstance(part, int):  # of a list
            keys.append(str(part))
            continue
        if not arms and (part in TYPE_TAGS or "[" in str(part) or str(part).startswith("constrained-")):
            continue
        keys.append(str(part))
        arm = arms[0] if arms else None
        beside = list(arm.model_fields) if arm is not None else []
        field = arm.model_fields.get(str(part)) if arm is not None else None
        here = field.annotation if field is not None else None
    return keys, beside


# Names that pydantic adds to a location for the branch of a union it tried; they are no keys of ours.
TYPE_TAGS = {"str", "int", "float", "bool"}
SHAPES_OF_SOURCES = {"a path", "one source", "several", "held out"}  # tags of data.train and data.eval


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The config objects an annotation stands for: one, several in a union, or none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for arm in typing.get_args(annotation) for found in models_in(arm)]


def tag_of(model: type[BaseModel]) -> str | None:
    """What `type` says in this arm of a union; of a user's own objective, which may say anything, the arm's name."""
    field = model.model_fields.get("type")
    return next(iter(typing.get_args(field.annotation)), PLUGIN) if field is not None else None


def to_yaml(config: BaseModel | dict[str, Any]) -> str:
    stream = io.StringIO()
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.dump(config if isinstance(config, dict) else json.loads(config.model_dump_json()), stream)
    return stream.getvalue()
