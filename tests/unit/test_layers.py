"""The import table of docs/architecture.md, walked with ast: no upward import, heavy packages stay in their place."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "ftray"

# part: (parts of ftray it may import, packages it must not import)
TABLE = {
    "errors": (set(), {"torch", "ray", "deepspeed", "transformers", "pydantic"}),
    "config": ({"errors"}, {"torch", "ray", "deepspeed", "transformers"}),
    "storage": ({"errors"}, {"torch", "ray", "deepspeed", "transformers"}),
    "objectives": ({"errors"}, {"ray", "deepspeed", "transformers", "torch.distributed"}),
    "model": ({"errors", "config", "storage"}, {"ray", "deepspeed"}),
    "data": ({"errors", "config", "storage", "model"}, {"ray", "deepspeed"}),
    "registry": ({"errors", "config", "storage"}, {"torch", "ray", "deepspeed", "transformers"}),
    "tracking": ({"errors", "config", "storage"}, {"torch", "ray", "deepspeed", "transformers"}),
    "infer": ({"errors", "config", "model"}, {"ray", "deepspeed", "vllm"}),
    "evaluate": ({"errors", "config", "data", "model", "infer", "tracking"}, {"ray", "deepspeed"}),
    "train": (
        {"errors", "config", "storage", "data", "model", "objectives", "infer", "evaluate", "tracking"},
        {"deepspeed", "ray"},
    ),
    "sweep": (
        {"errors", "config", "storage", "data", "model", "objectives", "train", "infer", "evaluate", "tracking"}
        | {"registry"},
        {"deepspeed", "ray"},
    ),
    "serve": ({"errors", "config", "storage", "model", "infer", "registry", "tracking"}, {"deepspeed", "ray"}),
}
# Where a package that a part must not import is at home.
AT_HOME = {
    "infer/vllm_engine.py": {"vllm"},
    "train/engine.py": {"deepspeed"},
    "train/zero.py": {"deepspeed"},
    "train/worker.py": {"ray"},
    "train/launch.py": {"ray"},
    "train/session.py": {"ray"},
    "train/ray_trainer.py": {"ray"},
    "train/recording.py": {"ray"},
    "train/preflight.py": {"ray"},
    "train/spread.py": {"ray"},
    "sweep/measure.py": {"ray"},
    "sweep/fused_trials.py": {"ray"},
    "sweep/fused_clerk.py": {"ray"},
    "sweep/fused_worker.py": {"ray"},
    "sweep/tune_trials.py": {"ray"},
    "serve/app.py": {"ray"},
    "serve/ray_metrics.py": {"ray"},
    "serve/remote.py": {"ray"},
    "serve/routing.py": {"ray"},
}
TOP = {"cluster", "cli", "pipeline", "publish", "quickstart", "__main__"}  # may import everything


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
    part = relative.split("/")[0].removesuffix(".py")
    if part in TOP or part == "__init__":
        return []
    allowed, banned = TABLE[part]
    banned = banned - AT_HOME.get(relative, set())
    found = []
    for name in imports_of(source):
        pieces = name.split(".")
        if pieces[0] == "ftray" and len(pieces) > 1 and pieces[1] not in allowed | {part, "__version__"}:
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
    assert violations("train/engine.py", "import deepspeed") == []


def test_files_and_jobs_stay_small():
    long = {p.name: n for p in ROOT.rglob("*.py") if (n := len(p.read_text().splitlines())) > 320}
    assert long == {}
    jobs = {p.name: n for p in (ROOT.parent / "jobs").glob("*.py") if (n := len(p.read_text().splitlines())) > 40}
    jobs.pop("bench.py", None)
    assert jobs == {}
    assert not list(ROOT.rglob("utils.py"))
