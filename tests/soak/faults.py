"""200 random faults: `make soak-faults`. Something is killed at a random point, a random file is cut or changed, a copy
of before is put back, a disk is filled; then the same command again.

It must end with: never a wrong alias, never another weight than the undisturbed run's, never a lost or doubled row of
the ledger that somebody was told of, and every refusal one clear line with the file. The faults come from a seed. The
result is a JSON file; the exit code says whether it holds.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny import chat_rows, write_jsonl, write_tiny_model

# How many of each, of 200.
# What ends with a driver may still move its scratch files about, and no backup needs them.
SCRATCH = shutil.ignore_patterns("scratch")
SHARES = {"registry file": 50, "registry kill": 25, "registry restored": 20, "ledger": 40, "tokens": 35, "run": 30}
STEPS, EVERY = 24, 4
RUN = """kind: run
name: a
base_model: {root}/base
data: {{train: {root}/train.jsonl, eval: {root}/eval.jsonl}}
max_steps: {steps}
batch: {{examples_per_step: 4}}
adapter: {{rank: 4}}
checkpoint: {{every: {every}, keep: 2}}
evaluation: {{every: 8}}
workers: {{count: 1}}
compile: false
"""


@dataclass
class Trial:
    root: Path
    chance: random.Random
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def note(self, fault: str, problem: str) -> None:
        self.wrong.append(f"{fault}: {problem}")


def spoil(path: Path, chance: random.Random) -> str:
    """One of the things that power cuts, disks and people do to a file; returns which."""
    content = path.read_bytes()
    how = chance.choice(("cut", "emptied", "one bit", "zeros at the end", "removed"))
    if how == "removed":
        path.unlink()
    elif how == "one bit" and content:
        place = chance.randrange(len(content))
        path.write_bytes(content[:place] + bytes([content[place] ^ (1 << chance.randrange(8))]) + content[place + 1 :])
    elif how == "zeros at the end":
        path.write_bytes(content + b"\0" * 64)
    else:
        path.write_bytes(content[: chance.randrange(len(content)) if how == "cut" and content else 0])
    return how


def is_clear(message: str, path: Path) -> bool:
    return "Traceback" not in message and path.name in message


# -- the registry ----------------------------------------------------------------------------------------------------


def act_on_registry(location: str, seed: int) -> None:
    """In a process of its own, which is killed: publishes and promotes, and says what is done once it is."""
    from ftray.registry import Registry

    registry, chance = Registry(location), random.Random(seed)
    adapter = Path(location).parent / "adapter"
    for _ in range(1000):
        if chance.random() < 0.4:
            print("try publish", flush=True)
            print(
                f"done publish {registry.publish('a', adapter, metadata={'base_fingerprint': 'f'}).number}", flush=True
            )
        else:
            number = chance.choice(registry.versions("a"))
            print(f"try promote {number}", flush=True)
            registry.promote(f"a@{number}", "prod")
            print(f"done promote {number}", flush=True)


def new_registry(trial: Trial) -> Path:
    from ftray.registry import Registry

    place = trial.root / "registry"
    shutil.rmtree(place, ignore_errors=True)
    adapter = trial.root / "adapter"
    adapter.mkdir(exist_ok=True)
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.safetensors").write_bytes(b"weights" * 100)
    registry = Registry(str(place))
    for _ in range(3):
        registry.publish("a", adapter, metadata={"base_fingerprint": "f"})
    for number in (1, 2, 3, 2):
        registry.promote(f"a@{number}", "prod")
    return place


def registry_file(trial: Trial) -> str:
    from ftray.errors import FtrayError
    from ftray.registry import Registry
    from ftray.registry.verify import verify_registry

    place, chance = new_registry(trial), trial.chance
    live = Registry(str(place), tolerant=True)
    live.refresh()
    files = sorted(path for path in place.rglob("*") if path.is_file())
    path = chance.choice(files)
    before = path.read_bytes()
    how = spoil(path, chance)
    fault = f"registry file {path.relative_to(place)} {how}"
    is_seen = (path.read_bytes() if path.exists() else None) != before
    if live.resolve("a@prod").number != 2:
        trial.note(fault, "a live endpoint follows a wrong alias")
    try:
        if (now := Registry(str(place)).resolve("a@prod").number) != 2:
            trial.note(fault, f"a@prod is a@{now}")
    except FtrayError as error:
        if not is_clear(str(error), path) and "journal" not in str(error):
            trial.note(fault, f"an unclear refusal: {error}")
    if is_seen and path.name not in ("claim.json", ".lock") and not verify_registry(str(place)).problems:
        trial.note(fault, "verify finds nothing")
    path.write_bytes(before)
    if verify_registry(str(place)).problems or Registry(str(place)).resolve("a@prod").number != 2:
        trial.note(fault, "put right again it is not right")
    return fault


def registry_kill(trial: Trial) -> str:
    from ftray.registry import Registry
    from ftray.registry.verify import verify_registry

    place, chance = new_registry(trial), trial.chance
    command = [sys.executable, __file__, "--act", str(place), str(chance.randrange(10**6))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline()]
        time.sleep(chance.random() * 0.4)
        process.send_signal(signal.SIGKILL)
        lines += process.stdout.readlines()
    fault = f"registry killed after {len(lines)} lines"
    said = [line.split() for line in lines if line.endswith("\n")]
    done = [words for words in said if words[:1] == ["done"]]
    moves = [int(words[2]) for words in done if words[1] == "promote"]
    allowed = {moves[-1] if moves else 2}
    if said and said[-1][:2] == ["try", "promote"]:
        allowed.add(int(said[-1][2]))  # in flight: it may have got through
    now = Registry(str(place)).resolve("a@prod").number
    if now not in allowed:
        trial.note(fault, f"a@prod is a@{now}, one of {sorted(allowed)} was said")
    published = {int(words[2]) for words in done if words[1] == "publish"}
    if missing := published - set(Registry(str(place)).versions("a")):
        trial.note(fault, f"versions {sorted(missing)} were said to be published")
    in_flight = said and said[-1][:2] == ["try", "publish"]  # its files may be there, and its entry not
    problems = [text for text in verify_registry(str(place)).problems if not (in_flight and "was interrupted" in text)]
    trial.wrong += [f"{fault}: verify: {problem}" for problem in problems]
    Registry(str(place)).promote("a@1", "prod")
    return fault


def registry_restored(trial: Trial) -> str:
    """A copy of before comes back under a reader that knows more."""
    from ftray.errors import FtrayError
    from ftray.registry import Registry

    place, chance = new_registry(trial), trial.chance
    copy = trial.root / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(place, copy)
    known = Registry(str(place), tolerant=True)
    moves = [chance.choice((1, 3)) for _ in range(chance.randrange(1, 4))]
    for number in moves:
        known.promote(f"a@{number}", "prod")
    shutil.rmtree(place)
    shutil.copytree(copy, place)
    again = chance.random() < 0.7
    fault = f"registry restored under a reader, {len(moves)} moves earlier{', and written on' if again else ''}"
    if again:
        Registry(str(place)).promote("a@1", "prod")
    try:
        if (now := known.resolve("a@prod").number) != moves[-1]:
            trial.note(fault, f"the reader goes to a@{now} without a word; it knew a@{moves[-1]}")
    except FtrayError as error:
        if "journal" not in str(error):
            trial.note(fault, f"an unclear refusal: {error}")
    return fault


# -- the ledger ------------------------------------------------------------------------------------------------------


def act_on_ledger(database: str, seed: int) -> None:
    from ftray.serve.tenants.accounts import Accounts, Usage
    from ftray.serve.tenants.writer import LedgerWriter

    accounts = Accounts(database)
    writer = LedgerWriter(accounts.record, retry_s=0.05)
    for number in range(5000):
        name = f"{seed}-{number}"
        row = writer.put(Usage(name, "acme", "m", 1, 0, 1, "whole", 1.0))
        row.result(timeout=30)
        print(name, flush=True)


def ledger(trial: Trial) -> str:
    chance = trial.chance
    database = trial.root / "tenants.db"
    seed = chance.randrange(10**9)
    command = [sys.executable, __file__, "--ledger", str(database), str(seed)]
    is_full = chance.random() < 0.3
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(chance.random() * 0.3)
        if is_full:  # no writer gets through meanwhile
            with sqlite3.connect(database, timeout=10) as other:
                other.execute("BEGIN IMMEDIATE")
                time.sleep(chance.random() * 0.2)
                process.send_signal(signal.SIGKILL)
                other.rollback()
        process.send_signal(signal.SIGKILL)
        said = {line.strip() for line in process.stdout.readlines() if line.endswith("\n")}
    fault = f"ledger killed after {len(said)} rows{' while it could not write' if is_full else ''}"
    with sqlite3.connect(database) as connection:
        if connection.execute("PRAGMA integrity_check").fetchone() != ("ok",):
            trial.note(fault, "the database is damaged")
        rows = [
            row[0] for row in connection.execute("SELECT request_id FROM usage WHERE request_id LIKE ?", (f"{seed}-%",))
        ]
    if lost := said - set(rows):
        trial.note(fault, f"{len(lost)} rows were said to be written and are not there")
    if len(rows) != len(set(rows)):
        trial.note(fault, "rows are doubled")
    from ftray.serve.tenants.accounts import Accounts, Usage

    accounts = Accounts(str(database))
    accounts.record([Usage(name, "acme", "m", 1, 0, 1, "whole", 1.0) for name in rows[:5]])  # told once more
    accounts.close()
    with sqlite3.connect(database) as connection:
        (count,) = connection.execute("SELECT count(*) FROM usage WHERE request_id LIKE ?", (f"{seed}-%",)).fetchone()
    if count != len(rows):
        trial.note(fault, "a row that was told twice counts twice")
    return fault


# -- kept tokens -----------------------------------------------------------------------------------------------------


def tokens(trial: Trial) -> str:
    from ftray.config import parse_config
    from ftray.data.tokens import tokenize_source
    from ftray.model.base import load_tokenizer, prepare_base
    from ftray.model.chat import ChatRenderer

    run = parse_config(RUN.format(root=trial.root, steps=1, every=1), kind="run", source="faults")
    renderer = ChatRenderer(load_tokenizer(prepare_base(run.base_model)))
    kept = trial.root / "kept"

    def digest() -> str:
        return tokenize_source("data.train", run.data.train, run.data, renderer, kept_in=kept).digest()

    expected = digest()
    path = trial.chance.choice(sorted(path for path in kept.rglob("*") if path.is_file() and path.suffix != ".lock"))
    how = spoil(path, trial.chance)
    fault = f"tokens {path.name} {how}"
    if digest() != expected:
        trial.note(fault, "other tokens than before")
    return fault


# -- runs ------------------------------------------------------------------------------------------------------------


def train(root: Path, runs: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ftray", "train", str(root / "run.yaml"), f"runs_dir={runs}", *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=root)


def weights(run: Path) -> str:
    return hashlib.sha256((run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def run_fault(trial: Trial, expected: str, finished: Path) -> str:
    root, chance = trial.root, trial.chance
    runs = root / "runs"
    shutil.rmtree(runs, ignore_errors=True)
    kind = chance.choice(("killed", "killed and a file", "finished and a file", "killed and restored", "full disk"))
    if kind == "finished and a file":
        shutil.copytree(finished, runs)
        fault = kind
    elif kind == "full disk":
        fault = full_disk(trial, runs)
    else:
        seconds = killed(root, runs, chance)
        fault = f"run {kind}, {seconds:.1f} s after its first step"
    run = runs / "a"
    spoiled: tuple[Path, bytes] | None = None
    if kind == "killed and restored":  # the directory of before, as a backup has it
        backup = root / "backup"
        shutil.rmtree(backup, ignore_errors=True)
        shutil.copytree(runs, backup, ignore=SCRATCH)
        killed(root, runs, chance)
        removed(runs)
        shutil.copytree(backup, runs)
    elif kind.endswith("a file"):
        files = sorted(path for path in run.rglob("*") if path.is_file() and "scratch" not in path.parts)
        path = chance.choice(files)
        spoiled = path, path.read_bytes()
        fault += f": {path.relative_to(run)} {spoil(path, chance)}"
    for _ in range(3):
        process = train(root, runs)
        said = process.communicate(timeout=300)[0]
        if process.returncode == 0:
            break
        if "Traceback" in said or "error: " not in said:
            trial.note(fault, f"no clear refusal: {said[-400:]}")
            break
        last = said[said.rindex("error: ") :]
        trial.counts["refusals of runs"] += 1
        if spoiled is None:
            trial.note(fault, f"refused without a damaged file: {last[:300]}")
            break
        if spoiled[0].name not in last and "--fresh" not in last:
            trial.note(fault, f"the refusal names no file: {last[:300]}")
        spoiled[0].parent.mkdir(parents=True, exist_ok=True)
        spoiled[0].write_bytes(spoiled[1])  # the way on: it is put back
    if process.returncode == 0 and weights(run) != expected:
        trial.note(fault, "other weights than the undisturbed run's")
    return fault


def removed(directory: Path) -> None:
    """Also while what ends with a killed driver still writes there."""
    for _ in range(100):
        shutil.rmtree(directory, ignore_errors=True)
        if not directory.exists():
            return
        time.sleep(0.1)
    raise AssertionError(f"{directory} is still written to")


def killed(root: Path, runs: Path, chance: random.Random) -> float:
    """A driver, or its worker, by SIGKILL, at a random point after its first step."""
    process = train(root, runs)
    metrics = runs / "a" / "metrics.jsonl"
    size = metrics.stat().st_size if metrics.is_file() else 0
    while process.poll() is None and not (metrics.is_file() and metrics.stat().st_size != size):
        time.sleep(0.02)
    seconds = chance.random() * 2
    time.sleep(seconds)
    process.kill()
    process.communicate()
    return seconds


def full_disk(trial: Trial, runs: Path) -> str:
    """A file system of its own, filled at a random point and emptied again."""
    disk = trial.root / "disk"
    disk.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)], check=True)
    try:
        process = train(trial.root, disk)
        metrics = disk / "a" / "metrics.jsonl"
        while process.poll() is None and not (metrics.is_file() and metrics.stat().st_size):
            time.sleep(0.02)
        time.sleep(trial.chance.random())
        filler = disk / "filler"
        try:
            with filler.open("wb") as file:
                while True:
                    file.write(b"x" * 65536)
                    file.flush()
        except OSError:
            pass
        process.communicate(timeout=300)
        filler.unlink()
        shutil.copytree(disk, runs, ignore=SCRATCH)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
    return f"a full disk during a run (exit code {process.returncode})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=28)
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks/faults.json"))
    parser.add_argument("--act", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--ledger", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.act:
        act_on_registry(options.act[0], int(options.act[1]))
        return 0
    if options.ledger:
        act_on_ledger(options.ledger[0], int(options.ledger[1]))
        return 0
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        write_tiny_model(root / "base")
        write_jsonl(root / "train.jsonl", chat_rows(40))
        write_jsonl(root / "eval.jsonl", chat_rows(10, seed=1))
        (root / "run.yaml").write_text(RUN.format(root=root, steps=STEPS, every=EVERY))
        os.environ.pop("RAY_ADDRESS", None)
        trial = Trial(root, random.Random(options.seed))
        finished = root / "finished"
        process = train(root, finished)
        said = process.communicate()[0]
        assert process.returncode == 0, said
        expected = weights(finished / "a")
        faults: dict[str, Callable[[], Any]] = {
            "registry file": lambda: registry_file(trial),
            "registry kill": lambda: registry_kill(trial),
            "registry restored": lambda: registry_restored(trial),
            "ledger": lambda: ledger(trial),
            "tokens": lambda: tokens(trial),
            "run": lambda: run_fault(trial, expected, finished),
        }
        plan = [kind for kind, count in SHARES.items() for _ in range(round(count * options.faults / 200))]
        trial.chance.shuffle(plan)
        happened = []
        for number, kind in enumerate(plan):
            try:
                happened.append(faults[kind]())
            except Exception as error:  # noqa: BLE001  what nobody refused clearly
                happened.append(f"{kind} {number}")
                trial.note(happened[-1], f"{type(error).__name__}: {error}")
            trial.counts[kind] += 1
            print(f"{number + 1}/{len(plan)} {happened[-1]}; wrong: {len(trial.wrong)}", flush=True)
    result = {
        "faults": len(plan),
        "seed": options.seed,
        "seconds": round(time.monotonic() - began, 1),
        **dict(sorted(trial.counts.items())),
        "wrong": trial.wrong,
        "num wrong": len(trial.wrong),
        "what happened": happened,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result | {"what happened": len(happened)}, indent=1))
    return 1 if trial.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
