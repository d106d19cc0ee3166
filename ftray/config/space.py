"""The points of a sweep, and the run that each stands for. All that can be wrong with them is said before the start."""

import copy
import itertools
import json
import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ftray.config.domains import Choice, Domain, Range, expression_order
from ftray.config.expression import Expression
from ftray.config.load import KINDS, describe_problem, load_config, problems_in, read_yaml, set_at
from ftray.config.renamed import with_new_names
from ftray.config.run import RunConfig
from ftray.config.sweep import NOT_SWEPT, SearchConfig, SweepConfig, is_variable
from ftray.errors import ConfigError
from ftray.schema import Strict

SAMPLED_POINTS = 200  # of a space that is not a grid: so many are checked against the run's schema before the start
SHOWN_PROBLEMS = 20


@dataclass(frozen=True)
class Space:
    """The points of a sweep, and the run that each stands for."""

    run: dict[str, Any]  # the run file's tree, with the sweep's overrides
    domains: dict[str, Domain]

    @property
    def free(self) -> dict[str, Choice | Range]:
        """What is chosen; the rest follows from it."""
        return {key: domain for key, domain in self.domains.items() if not isinstance(domain, Expression)}

    def grid(self, trials: int | None = None) -> Iterator[dict[str, Any]]:
        """Its points, or the first so many. The last key changes fastest."""
        for values in itertools.islice(itertools.product(*(domain.grid for domain in self.free.values())), trials):
            yield dict(zip(self.free, values, strict=True))

    def sample(self, chance: random.Random) -> dict[str, Any]:
        return {key: sample(domain, chance) for key, domain in self.free.items()}

    def overrides(self, point: dict[str, Any]) -> dict[str, Any]:
        """The whole of what a point sets in a run: expressions are in it, variables are not. Raises ValueError."""
        values = dict(point)
        for key in expression_order(self.domains):
            if key not in values:  # a cloned trial may set it by hand
                expression = self.domains[key]
                assert isinstance(expression, Expression)
                values[key] = expression.evaluate(lambda name: self._known(values, name))
        return without_variables(values)

    def _known(self, values: dict[str, Any], key: str) -> Any:
        """What a point, the run's file or the run's defaults have there. Raises ValueError."""
        if key in values:
            return values[key]
        tree = self._tree(without_variables(values))
        try:
            return value_at(tree, key)
        except ValueError:
            return value_at(RunConfig.model_validate(tree), key)

    def config(self, point: dict[str, Any], **more: Any) -> RunConfig:
        """The run of a point. `more`: top-level keys. Raises ValueError, a `ValidationError` among them."""
        return RunConfig.model_validate(self._tree(self.overrides(point)) | more)

    def first_run(self, sweep: SweepConfig) -> RunConfig:
        """The sweep, as those parts see it that know runs: its data, workers and place."""
        return self.config(next(iter(self.points_to_check(sweep.search))), name=sweep.name)

    def check_point(self, point: dict[str, Any], *, label: str) -> None:
        """Raises `ConfigError` with what the run's schema refuses."""
        try:
            self.config(point)
        except ValidationError as error:
            raise ConfigError(label, problems_in(RunConfig, error)) from None
        except ValueError as error:
            raise ConfigError(label, [str(error)]) from None

    def _tree(self, values: dict[str, Any]) -> dict[str, Any]:
        tree = copy.deepcopy(self.run)
        for key, value in values.items():
            set_at(tree, key, copy.deepcopy(value))
        return tree

    def points_to_check(self, search: SearchConfig) -> Iterator[dict[str, Any]]:
        """All of a grid that will run; else every choice and every end of a range beside a point, and points by
        chance."""
        if search.algorithm == "grid":
            yield from self.grid(search.trials)
            return
        chance = random.Random(0)
        first = {key: domain.extremes[0] for key, domain in self.free.items()}
        for key, domain in self.free.items():
            yield from (first | {key: value} for value in domain.extremes)
        yield from (self.sample(chance) for _ in range(SAMPLED_POINTS))


def without_variables(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if not is_variable(key)}


def sample(domain: Choice | Range, chance: random.Random) -> Any:
    if isinstance(domain, Choice):
        return chance.choice(domain.values)
    half = 0.5 if domain.is_int else 0.0  # each whole number has the same share, those at the ends too
    low, high = domain.low - half, domain.high + half
    value = math.exp(chance.uniform(math.log(low), math.log(high))) if domain.is_log else chance.uniform(low, high)
    return min(max(round(value), domain.low), domain.high) if domain.is_int else value


def value_at(config: RunConfig | dict[str, Any], key: str) -> Any:
    """What a run has there, its defaults included, or a tree. Raises ValueError."""
    found: Any = config
    for part in key.split("."):
        if isinstance(found, dict) and part in found:
            found = found[part]
        elif isinstance(found, Strict) and part in type(found).model_fields:
            found = getattr(found, part)
        else:
            raise ValueError(f"a run has no key {key!r}")
    return found


def merged(tree: dict[str, Any], overrides: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`overrides` as dotted keys, as sections, or both."""
    result = copy.deepcopy(tree)
    for key, value in overrides.items():
        if isinstance(value, dict) and value:
            for inner, leaf in value.items():
                result = merged(result, {f"{key}.{inner}": leaf})
        else:
            set_at(result, key, value)
    return result


def load_sweep(path: str | Path, overrides: Sequence[str] = ()) -> tuple[SweepConfig, Space]:
    """Raises `ConfigError` with every problem of the sweep's file, of its run's, and of the points."""
    config: SweepConfig = load_config(path, overrides, kind="sweep")
    load_config(config.run, kind="run")
    tree = with_new_names(read_yaml(Path(config.run).read_text(encoding="utf-8"), source=config.run))
    try:
        space = Space(merged(tree, config.overrides), config.space)
    except ValueError as error:
        raise ConfigError(str(path), [f"overrides: {error}"]) from None
    try:
        run = RunConfig.model_validate(space.run)
    except ValidationError as error:
        problems = [f"overrides: {problem}" for problem in problems_in(RunConfig, error)]
        raise ConfigError(str(path), problems) from None
    if not config.seeds:
        config = config.model_copy(update={"seeds": (run.seed,)})
    if problems := problems_of(space, config):
        raise ConfigError(str(path), problems)
    return config, space


def load_any(path: str | Path, overrides: Sequence[str] = ()) -> tuple[str, Any]:
    """The kind that the file says it is, and its config. Raises `ConfigError`."""
    tree = read_yaml(Path(path).read_text(encoding="utf-8"), source=str(path)) if Path(path).is_file() else {}
    kind = tree.get("kind") if isinstance(tree, dict) else None
    if kind == "sweep":
        return kind, load_sweep(path, overrides)[0]
    if Path(path).is_file() and kind not in KINDS:
        raise ConfigError(str(path), [f"kind: {kind!r} must be one of {', '.join(KINDS)}"])
    known = str(kind or "run")
    return known, load_config(path, overrides, kind=known)


def problems_of(space: Space, config: SweepConfig) -> list[str]:
    """What the run's schema refuses of the points: each rule once, at the first point that breaks it."""
    found: dict[Any, str] = {}
    evaluated_on: set[str | None] = set()
    for point in space.points_to_check(config.search):
        at = f"space: at {point_text(point)}"
        try:
            run = space.config(point)
        except ValidationError as error:
            for item in error.errors():
                for number, problem in enumerate(describe_problem(RunConfig, item).splitlines()):
                    found.setdefault((item["loc"], item["type"], number), f"{at}: {problem}")
        except ValueError as error:
            found.setdefault("expression", f"{at}: {error}")
        else:
            if config.search.metric == "eval_loss" and run.data.eval is None:
                found["metric"] = "search.metric: eval_loss needs data.eval in the run; add it, or choose metric loss"
            evaluated_on.add(run.data.model_dump_json(include={"eval"}))
            if len(evaluated_on) > 1:
                found.setdefault("eval", f"{at}: data.eval is {run.data.eval}: {NOT_SWEPT['data.eval']}")
            steps, every = config.search.generation_steps, run.evaluation.every
            if steps is not None and steps % every:
                found["generation"] = f"search.generation_steps: {steps} is no multiple of evaluation.every ({every})"
    return list(found.values())[:SHOWN_PROBLEMS]


def point_text(point: dict[str, Any]) -> str:
    return ", ".join(f"{key}={short(value)}" for key, value in point.items())


def short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else flow_text(value)


def flow_text(value: Any) -> str:
    """YAML on one line, as an override is read."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list):
        return "[" + ", ".join(flow_text(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {flow_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, str) and (not re.fullmatch(r"[A-Za-z][\w./@-]*", value) or value in ("null", "true", "false")):
        return json.dumps(value)
    return str(value)
