"""`python jobs/loss_compare.py A B [--config CONFIG] [--steps N]`: one run by two commits, or with two settings.

    python jobs/loss_compare.py HEAD~1 HEAD                                   a refactor: to the last bit
    python jobs/loss_compare.py zero.stage=2 "zero.stage=3 workers.count=2" --rtol 1e-5

A side is a commit (checked out beside this tree), `.` (this tree as it is), or settings `key=value ...`, which this
tree runs. Both train the same CONFIG from its first step; loss and gradient norm of each step stand side by side. Exit
code 0 when they agree to RTOL (0: to the last bit), 1 when they do not or a side fails, 2 when a side is neither.
"""

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMPARED = ("loss", "grad_norm")
Losses = list[dict[str, float]]  # a step each


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a")
    parser.add_argument("b")
    parser.add_argument("--config", default="configs/quickstart/run.yaml")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rtol", type=float, default=0.0)
    chosen = parser.parse_args()
    for side in (chosen.a, chosen.b):
        if not is_settings(side) and side != "." and commit_of(side) is None:
            print(f"error: {side}: is no commit, no `key=value`, and not `.`", file=sys.stderr)
            sys.exit(2)
    with tempfile.TemporaryDirectory(prefix="ftray-compare-") as directory:
        sides = []
        for name, side in (("a", chosen.a), ("b", chosen.b)):
            print(f"{name}: {side}, {chosen.steps} steps of {chosen.config} ...", flush=True)
            sides.append(train(side, chosen.config, steps=chosen.steps, runs=Path(directory) / name))
    problems = differences(*sides, rtol=chosen.rtol)
    print(table(*sides))
    print("\n".join(problems) or f"equal to {chosen.rtol or 'the last bit'}")
    sys.exit(1 if problems else 0)


def is_settings(side: str) -> bool:
    return all("=" in part for part in side.split())


def commit_of(side: str) -> str | None:
    command = ["git", "-C", str(ROOT), "rev-parse", "--verify", "--quiet", f"{side}^{{commit}}"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None


@contextlib.contextmanager
def tree_of(side: str, *, beside: Path) -> Iterator[Path]:
    """This tree, or a commit's own."""
    if is_settings(side) or side == ".":
        yield ROOT
        return
    commit, tree = commit_of(side), beside.with_name(f"{beside.name}-tree")
    subprocess.run(
        ["git", "-C", str(ROOT), "worktree", "add", "--quiet", "--detach", str(tree), str(commit)], check=True
    )
    try:
        yield tree
    finally:
        subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(tree)], check=False)


def train(side: str, config: str, *, steps: int, runs: Path) -> Losses:
    settings = side.split() if is_settings(side) else []
    with tree_of(side, beside=runs) as tree:
        fixed = ["epochs=null", f"max_steps={steps}", f"runs_dir={runs}", "name=compared"]
        command = [sys.executable, "-m", "ftray", "train", config, *fixed, *settings]
        environment = os.environ | {"PYTHONPATH": str(tree)}
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            sys.exit(f"{side} failed ({' '.join(command[1:])}):\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        lines = (runs / "compared" / "metrics.jsonl").read_text().splitlines()
    return [record for line in lines if "loss" in (record := json.loads(line))]


def differences(a: Losses, b: Losses, *, rtol: float) -> list[str]:
    found = [] if len(a) == len(b) else [f"a has {len(a)} steps, b has {len(b)}"]
    for step, (ours, theirs) in enumerate(zip(a, b, strict=False), start=1):
        for key in COMPARED:
            if not math.isclose(ours[key], theirs[key], rel_tol=rtol):  # NaN is close to nothing
                found.append(f"step {step}: {key} {ours[key]!r} and {theirs[key]!r}")
    return found


def table(a: Losses, b: Losses) -> str:
    lines = [f"{'step':>4}  {'loss a':>20}  {'loss b':>20}  {'grad_norm a':>20}  {'grad_norm b':>20}"]
    for step, (ours, theirs) in enumerate(zip(a, b, strict=False), start=1):
        values = [f"{side[key]:>20.16g}" for key in COMPARED for side in (ours, theirs)]
        lines.append(f"{step:>4}  " + "  ".join(values))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
