"""The rooms of docs/explanation/architecture.md, walked with ast: no import upward, no circle, packages at home."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "ftray"

TORCH = {"torch", "transformers"}
# What every room may import: errors, value types, configs and files.
GROUND = {"errors", "schema", "plugins", "objectives", "config", "storage"}
MODELS = GROUND | {"child_process", "tasks", "model", "registry", "tracking", "data", "infer", "cluster", "evaluate"}
# room: (rooms of ftray it may import, packages it must not import). From the ground up.
TABLE = {
    "errors": (set(), {"pydantic", "ray", "deepspeed", *TORCH}),
    "schema": ({"errors"}, {"ray", "deepspeed", *TORCH}),
    "plugins": ({"errors"}, {"ray", "deepspeed", *TORCH}),
    "child_process": ({"errors"}, {"ray", "deepspeed", *TORCH}),
    "objectives": ({"errors", "schema", "plugins"}, {"ray", "deepspeed", "transformers", "torch.distributed"}),
    "config": ({"errors", "schema", "plugins", "objectives"}, {"ray", "deepspeed", *TORCH}),
    "storage": ({"errors"}, {"ray", "deepspeed", *TORCH}),
    "tasks": ({"errors", "plugins"}, {"ray", "deepspeed", *TORCH}),
    "model": (GROUND, {"ray", "deepspeed"}),
    "registry": (GROUND, {"ray", "deepspeed", *TORCH}),
    "tracking": (GROUND, {"ray", "deepspeed", *TORCH}),
    "data": (GROUND | {"model"}, {"ray", "deepspeed"}),
    "infer": (GROUND | {"model"}, {"ray", "deepspeed", "vllm"}),
    "cluster": (GROUND | {"model", "tracking"}, {"deepspeed", *TORCH}),
    "evaluate": (GROUND | {"tasks", "model", "data", "infer", "tracking"}, {"ray", "deepspeed"}),
    "submit": ({"errors", "plugins", "config", "storage"}, {"deepspeed", *TORCH}),
    "train": (MODELS, {"ray", "deepspeed"}),
    "plan": (GROUND | {"model", "train"}, {"ray", "deepspeed"}),
    "artifacts": (GROUND | {"model", "registry", "train"}, {"ray", "deepspeed"}),
    "doctor": (GROUND | {"model", "tracking", "infer", "cluster", "submit"}, {"deepspeed"}),
    "serve": (GROUND | {"child_process", "model", "infer", "registry", "tracking"}, {"ray", "deepspeed"}),
    "sweep": (MODELS | {"train"}, {"ray", "deepspeed"}),
    "pipeline": (MODELS | {"train", "artifacts", "sweep"}, {"deepspeed"}),
}
TOP = {"api", "cli", "quickstart", "__main__", "__init__"}  # may import everything
# Where a package that a room must not import is at home.
AT_HOME = {
    "infer/vllm_engine/engine.py": {"vllm"},
    "infer/vllm_engine/sampling.py": {"vllm"},
    "train/engine/deepspeed.py": {"deepspeed"},
    "train/engine/zero.py": {"deepspeed"},
    "train/launch.py": {"ray"},
    "train/hooks/recorder.py": {"ray"},
    "sweep/compare/measure.py": {"ray"},
    "sweep/fused/coordinator.py": {"ray"},
    "sweep/fused/reporter.py": {"ray"},
    "sweep/fused/worker.py": {"ray"},
    "serve/app.py": {"ray"},
    "serve/node_address.py": {"ray"},
    "serve/replica/deployment.py": {"ray"},
    "serve/telemetry/ray_meter.py": {"ray"},
    "serve/routing/handles.py": {"ray"},
    "serve/routing/router.py": {"ray"},
}
RAY_ROOMS = ("train/on_ray/", "sweep/on_tune/")
MAX_MODULES, MAX_COMMANDS = 14, 20  # in a folder; in cli/, which has a module for each command


def imports_of(source: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def violations(relative: str, source: str) -> list[str]:
    room = relative.split("/")[0].removesuffix(".py")
    if room in TOP:
        return []
    allowed, banned = TABLE[room]
    banned = banned - AT_HOME.get(relative, set()) - ({"ray"} if relative.startswith(RAY_ROOMS) else set())
    found = []
    for name in imports_of(source):
        pieces = name.split(".")
        if pieces[0] == "ftray" and len(pieces) > 1 and pieces[1] not in allowed | {room, "__version__"}:
            found.append(f"{relative} imports {name}")
        if any(name == package or name.startswith(f"{package}.") for package in banned):
            found.append(f"{relative} imports {name}")
    return found


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_follow_the_table(path):
    assert violations(path.relative_to(ROOT).as_posix(), path.read_text()) == []


def test_an_upward_import_is_found():
    assert violations("model/x.py", "from ftray.train import loop") != []
    assert violations("train/loop.py", "import deepspeed") != []
    assert violations("train/engine/deepspeed.py", "import deepspeed") == []
    assert violations("train/runs/x.py", "import ray.train") != []
    assert violations("train/on_ray/x.py", "import ray.train") == []


def test_the_table_goes_one_way():
    """A room imports rooms above it in the table alone, so that there is no circle of rooms."""
    seen = set()
    for room, (allowed, _) in TABLE.items():
        assert allowed <= seen, room
        seen.add(room)


def module_graph() -> dict[str, set[str]]:
    """Imports among modules, those inside functions too; packages' own files aside."""
    paths = {".".join(("ftray", *p.relative_to(ROOT).with_suffix("").parts)): p for p in ROOT.rglob("*.py")}
    modules = {name: path for name, path in paths.items() if path.name != "__init__.py"}
    return {name: imports_of(path.read_text()) & modules.keys() - {name} for name, path in modules.items()}


def circles(graph: dict[str, set[str]]) -> Iterator[str]:
    """Whoever reaches itself."""
    for start in graph:
        reached, ahead = set(), list(graph[start])
        while ahead:
            if (name := ahead.pop()) not in reached:
                reached.add(name)
                ahead.extend(graph[name])
        if start in reached:
            yield start


def test_no_modules_import_each_other_in_a_circle():
    assert list(circles(module_graph())) == []
    assert list(circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == ["a", "b", "c"]


def test_folders_files_and_jobs_stay_small():
    folders = {path.parent for path in ROOT.rglob("*.py")}
    counts = {f.relative_to(ROOT).as_posix(): sum(p.name != "__init__.py" for p in f.glob("*.py")) for f in folders}
    assert {f: n for f, n in counts.items() if n > (MAX_COMMANDS if f == "cli" else MAX_MODULES)} == {}
    long = {p.name: n for p in ROOT.rglob("*.py") if (n := len(p.read_text().splitlines())) > 320}
    assert long == {}
    jobs = {p.name: n for p in (ROOT.parent / "jobs").glob("*.py") if (n := len(p.read_text().splitlines())) > 40}
    assert jobs.keys() <= {"bench.py", "gpu_check.py", "loss_compare.py"}  # tools for developers
    assert not list(ROOT.rglob("utils.py"))


# Words that were this project's own where the field has one (CONTRIBUTING.md): no part of a name in ftray/.
BANNED = {
    *("gatekeeper", "exchange", "desk", "clerk", "stretch", "stretches", "company", "overdue", "mend", "happening"),
    *("tell", "told", "untold", "party", "parties", "say"),
}
BANNED_WHOLE = {
    "at_hand",
    "place_of",
    "Known",
    "Turns",
    "Places",
    "Gate",
    "Sampling",
    "Structure",
    "finish_run",
    "spread_base",
}


def banned_names(source: str) -> set[str]:
    tree, found = ast.parse(source), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    return {name for name in found if name in BANNED_WHOLE or BANNED & set(words_of(name))}


def words_of(name: str) -> list[str]:
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)]


def test_names_are_the_fields_own():
    found = {
        p.relative_to(ROOT).as_posix(): names for p in ROOT.rglob("*.py") if (names := banned_names(p.read_text()))
    }
    assert found == {}
    assert banned_names("def tell_all(told): at_hand = 1") == {"tell_all", "told", "at_hand"}
