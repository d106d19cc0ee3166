"""The wheel, taken apart: everything that the code reads is in it, and the command line starts without any extra."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What the extras bring, and the heavy half of the core: `ftray --help` needs none of it.
BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} is not installed here", name=name)
sys.meta_path.insert(0, Block())
from ftray.cli.main import app
app(sys.argv[1:])
"""
OF_EXTRAS = {
    "bitsandbytes",
    "liger_kernel",
    "psycopg",
    "vllm",
    "trl",
    "moto",
    "pytest",
    "playwright",
    "openai",
    "flask",
}
HEAVY = {"torch", "ray", "transformers", "deepspeed", "datasets", "wandb", "peft", "optuna", "matplotlib", "fastapi"}


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    made, where, source = (tmp_path_factory.mktemp(name) for name in ("wheel", "unpacked", "source"))
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(made)]
    # From a copy: setuptools would pack what an earlier build left in the tree.
    for name in subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split():
        if (ROOT / name).is_file() and name.split("/")[0] in ("ftray", "pyproject.toml", "README.md"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    done = subprocess.run([*build, str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = made.glob("ftray-*-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(where)
    return where


def test_everything_beside_the_code_is_in_it(unpacked):
    listed = subprocess.run(["git", "ls-files", "ftray"], cwd=ROOT, capture_output=True, text=True, check=True)
    missing = [name for name in listed.stdout.split() if not (unpacked / name).is_file()]
    assert missing == []
    assert not (unpacked / "tests").exists()


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["init", "starter"]], ids=" ".join)
def test_the_command_line_starts_without_extras_and_without_what_is_heavy(unpacked, tmp_path, words):
    code = f"BLOCKED = {OF_EXTRAS | HEAVY!r}\n{BLOCK}"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *words],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(unpacked), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
