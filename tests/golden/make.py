"""Writes losses.json anew: `python tests/golden/make.py`, for a change that is meant to change numbers.

The commit that carries the new file says which numbers changed and why; a refactor leaves it as it is.
"""

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "parity"), str(TESTS / "golden")]

PACKAGES = ("torch", "deepspeed", "transformers", "bitsandbytes")


def main() -> None:
    import conftest  # noqa: F401  the environment that the tests run in
    from cases import LOSSES, machine_kind, run_alone, run_fused

    runs = {"alone": run_alone, "fused": run_fused}
    losses = {}
    with tempfile.TemporaryDirectory() as directory:
        for name, run in runs.items():
            for world_size in (1, 2):
                losses |= run(world_size, Path(directory) / f"{name}-{world_size}")
    made = {
        "command": "python tests/golden/make.py",
        "machine": machine_kind(),
        "versions": {package: version(package) for package in PACKAGES},
    }
    LOSSES.write_text(json.dumps({"made": made, "losses": dict(sorted(losses.items()))}, indent=1) + "\n")
    print(f"written: {LOSSES.relative_to(Path.cwd()) if LOSSES.is_relative_to(Path.cwd()) else LOSSES}")


if __name__ == "__main__":  # the ranks' processes import this file again
    main()
