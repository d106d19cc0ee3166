"""The documentation is current: generated pages, links, commands, sizes."""

import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any, get_args

import pytest
import typer

from ftray.cli.main import COMMANDS as MAIN_COMMANDS, app, main
from ftray.config import RunConfig, load_config, load_sweep
from ftray.config.load import KINDS, read_yaml
from ftray.schema import Strict

ROOT = Path(__file__).parents[2]
TOP = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), *(ROOT / name for name in TOP)])
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)
OF_KIND = {"train": "run", "eval": "run", "plan": "run", "serve": "serve", "pipeline": "pipeline"}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def generator():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_current():
    """`python docs/generate.py` writes them."""
    pages = generator().PAGES
    assert {"reference/config.md", "reference/cli.md", "benchmarks/train.md", "benchmarks/serve.md"} <= pages.keys()
    for page, make in pages.items():
        assert (ROOT / "docs" / page).read_text() == make(), page


def broken_links(text: str, folder: Path) -> list[str]:
    targets = [target.partition("#")[0] for target in LINK.findall(text) if "://" not in target]
    return [target for target in targets if target and not (folder / target).exists()]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    assert broken_links(page.read_text(), page.parent) == []


def test_a_broken_link_is_found(tmp_path):
    assert broken_links("[a](no/such/page.md) [b](https://x.y)", tmp_path) == ["no/such/page.md"]


def commands(text: str) -> list[list[str]]:
    """`ftray ...` lines of fenced blocks, without comments."""
    lines = [line for block in FENCE.findall(text) for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("ftray ")]


COMMANDS = sorted({tuple(command) for page in PAGES for command in commands(page.read_text())})


def check_command(words: list[str]) -> None:
    """Raises where there is no such command or option, and where a config of ours refuses a key."""
    command: Any = typer.main.get_command(app)
    given = words[1:]
    while hasattr(command, "commands"):
        name = given[0]
        command = command.commands.get(name) or command.commands["run"]
        given = given[1:] if name in ("run", *command_names(name)) else given
    with command.make_context(words[1], list(given)) as context:
        path = context.params.get("config")
        overrides = [item for item in context.params.get("overrides") or () if "=" in item]
    if path is None or not str(path).startswith("configs/"):
        return
    if words[1] == "sweep":
        load_sweep(ROOT / path, overrides)
    elif words[1] in OF_KIND:
        load_config(ROOT / path, overrides, kind=OF_KIND[words[1]])


def command_names(name: str) -> set[str]:
    found, ahead = set(), [typer.main.get_command(app)]
    while ahead:
        for child_name, child in getattr(ahead.pop(), "commands", {}).items():
            found.add(child_name)
            ahead.append(child)
    return found


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_commands_are_understood(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    check_command(list(words))


@pytest.mark.parametrize("name", MAIN_COMMANDS)
def test_every_command_has_an_example_and_a_line_that_is_not_cut(name, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    _, short, example = MAIN_COMMANDS[name]
    check_command(shlex.split(example))
    for words in ([], ["--help"]):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert not ended.value.code
        printed = capsys.readouterr().out
        assert re.search(rf"^  {name} +{re.escape(short)}$", printed, re.MULTILINE)
    listed = re.findall(r"^  ([a-z]+)  ", printed, re.MULTILINE)
    assert listed == list(MAIN_COMMANDS), "in the order in which they are needed"


def test_the_config_with_every_key_has_every_key():
    written = read_yaml((ROOT / "configs/run/support_intents.yaml").read_text(), source="it")
    assert missing_keys(RunConfig, written) == []
    del written["optimizer"]["betas"]
    assert missing_keys(RunConfig, written) == ["optimizer.betas"]


def missing_keys(model: type[Strict], written: dict, prefix: str = "") -> list[str]:
    """Of a run's keys; `epochs` stands for `max_steps`, `columns` for `format`, an objective for the others."""
    found = []
    for key, field in model.model_fields.items():
        section: Any = next((a for a in (field.annotation, *get_args(field.annotation)) if is_section(a)), None)
        if key not in written and f"{prefix}{key}" not in ("max_steps", "data.format"):
            found.append(f"{prefix}{key}")
        elif section is not None and isinstance(written.get(key), dict) and key not in ("objective", "columns"):
            found += missing_keys(section, written[key], f"{prefix}{key}.")
    return found


def is_section(annotation: object) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Strict)


WRONG = ["ftray trian x", "ftray train x --drty-run", "ftray train configs/quickstart/run.yaml a.b=1"]


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_command_is_found(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(Exception):  # noqa: B017  of typer's or of the config
        check_command(line.split())


def test_the_readme_fits_and_names_what_is_there():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    for path in re.findall(r"^(ftray|configs|jobs|cluster|tests)(/\w*)", text, re.MULTILINE):
        assert (ROOT / "".join(path)).exists(), path
    targets = set(re.findall(r"make ([\w-]+)", "".join(page.read_text() for page in PAGES)))
    made = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert targets <= made, targets - made


def test_architecture_fits_and_every_kind_of_config_has_its_reference():
    assert len((ROOT / "docs/explanation/architecture.md").read_text().splitlines()) <= 150
    reference = (ROOT / "docs/reference/config.md").read_text()
    assert all(f"## kind: {kind}" in reference for kind in KINDS)


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "index.md").read_text()
    pages = [p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md") if p.name != "index.md"]
    assert [page for page in pages if page not in index] == []
