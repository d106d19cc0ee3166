"""`python jobs/gpu_check.py [--minutes 8] [--out FILE] [--only NAME ...] [--dry-run]`: what only a GPU can prove.

A list of records in the order of their worth; each is a process of its own, and they run until the time is over. FILE
(docs/benchmarks/gpu.json) keeps every result with versions and hardware; a second call goes on with the records that
have none yet, or have failed. With `--dry-run` the same programs run at tiny sizes wherever they are: it proves that
they will work, not what they measure, and writes nothing unless FILE is given.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs" / "benchmarks" / "gpu.json"
PACKAGES = ("torch", "transformers", "peft", "deepspeed", "ray", "bitsandbytes", "liger-kernel", "vllm")
Run = Callable[[list[str], float], tuple[int, str]]  # (command, seconds at most) -> (exit code, output)
TIMED_OUT = 124


@dataclass(frozen=True)
class Record:
    name: str
    proves: str
    seconds: int  # that it needs; it is not begun with less left, and ended after twice as many
    command: list[str]
    tiny: list[str] | None = None  # of a dry run; None: as `command`
    needs: tuple[str, ...] = ()  # packages


def test(name: str, proves: str, seconds: int, *needs: str) -> Record:
    return Record(name, proves, seconds, ["-m", "pytest", f"tests/gpu/test_gpu.py::{name}"], needs=needs)


def train(name: str, proves: str, *settings: str, seconds: int = 40, size: str = "26m", needs: str = "") -> Record:
    shape = {"26m": ["12", "16", "256"], "1.7b": ["9", "16", "2000"]}[size]
    program = ["jobs/bench_sides/gpu_train.py"]
    tiny = [*program, "tiny", "3", "4", "128", *settings]
    return Record(name, proves, seconds, [*program, size, *shape, *settings], tiny, (needs,) if needs else ())


def decode(engine: str, *counts: str, seconds: int, needs: str = "") -> Record:
    program = ["jobs/bench_sides/gpu_decode.py", engine]
    proves = f"the {engine} engine's tokens/s, base and 8 adapters of rank 16, 1.7B parameters"
    command = [*program, "1.7b", "128" if engine == "vllm" else "64", *counts]
    return Record(
        f"decode-{engine}", proves, seconds, command, [*program, "tiny", "4", "1", "3"], (needs,) if needs else ()
    )


RECORDS = [
    test("test_packed_equals_one_by_one", "packed rows are rows one by one, in bfloat16", 25),
    test("test_training_in_bfloat16_follows_float32", "ZeRO-2 and 3 over NCCL train alike", 50),
    test("test_mixed_adapters_generate", "the torch engine's mixed adapters have PEFT's log-probabilities", 30),
    train("train-lora-1.7b", "a LoRA's tokens/s, MFU and memory at 1.7B parameters", size="1.7b", seconds=75),
    train("train-lora-z2", "the losses of docs/benchmarks/gpu.md: LoRA, ZeRO-2", "zero.stage=2"),
    train("train-full-z2", "full fine-tuning, ZeRO-2", "adapter=null", "zero.stage=2"),
    decode("torch", "1", "16", "64", seconds=70),
    test("test_mixed_adapters_generate_with_vllm", "vLLM's mixed adapters have PEFT's log-probabilities", 90, "vllm"),
    train("train-compiled", "compile on a GPU", "compile=true", seconds=90),
    train("train-lora-z3", "LoRA, ZeRO-3", "zero.stage=3"),
    train("train-full-z3", "full fine-tuning, ZeRO-3", "adapter=null", "zero.stage=3"),
    train("train-qlora", "a base in nf4", "adapter.quantize_base=nf4", needs="bitsandbytes"),
    train("train-dpo", "preference pairs", "objective={type: dpo}"),
    train("train-8bit", "AdamW in 8 bits", "adapter=null", "optimizer.type=adamw_8bit", needs="bitsandbytes"),
    train("train-offload", "optimizer state in host memory", "adapter=null", "zero.offload=cpu", seconds=100),
    train("train-liger", "Liger's kernels", "memory.liger_kernels=true", needs="liger_kernel"),
    decode("vllm", "1", "16", "64", "256", seconds=200, needs="vllm"),
]
ONLY_ON_A_GPU = ("train-liger",)  # refused elsewhere; a dry run leaves it out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--only", nargs="+", default=[record.name for record in RECORDS], metavar="NAME")
    parser.add_argument("--dry-run", action="store_true")
    chosen = parser.parse_args()
    if unknown := set(chosen.only) - {record.name for record in RECORDS}:
        print(f"error: {', '.join(sorted(unknown))}: no such record", file=sys.stderr)
        sys.exit(2)
    path = chosen.out or (None if chosen.dry_run else OUT)
    wanted = [record for record in RECORDS if record.name in chosen.only]
    results = run_records(wanted, seconds=chosen.minutes * 60, dry_run=chosen.dry_run, path=path, run=run_program)
    counts = {
        status: sum(r["status"] == status for r in results.values()) for status in ("passed", "failed", "skipped")
    }
    print(f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped")
    sys.exit(1 if counts["failed"] else 0)


def run_records(
    records: list[Record], *, seconds: float, dry_run: bool, path: Path | None, run: Run, now=time.monotonic
) -> dict[str, dict]:
    """In their order, until the next one would not end in time; FILE is written after each. Returns all results."""
    ends = now() + seconds
    report = json.loads(path.read_text()) if path is not None and path.exists() else {"records": {}}
    results = report["records"]
    for record in records:
        if results.get(record.name, {}).get("status") == "passed":
            continue
        if now() + record.seconds > ends:
            print(f"{record.name}: left for later, it needs {record.seconds} s", flush=True)
            continue
        results[record.name] = outcome = run_record(record, dry_run=dry_run, run=run, left=ends - now())
        print(f"{record.name}: {json.dumps({k: v for k, v in outcome.items() if k != 'proves'})}", flush=True)
        if path is not None:
            path.write_text(json.dumps(report | {"dry_run": dry_run} | describe(), indent=1) + "\n")
    return results


def run_record(record: Record, *, dry_run: bool, run: Run, left: float) -> dict:
    missing = [name for name in record.needs if importlib.util.find_spec(name) is None]
    if missing or (dry_run and record.name in ONLY_ON_A_GPU):
        return {"proves": record.proves, "status": "skipped", "why": f"needs {', '.join(missing) or 'a GPU'}"}
    command = record.tiny if dry_run and record.tiny is not None else record.command
    began = time.monotonic()
    code, output = run([sys.executable, *command], min(2.0 * record.seconds, left))
    found: dict[str, Any] = {"proves": record.proves, "status": "passed" if code == 0 else "failed"}
    found["seconds"] = round(time.monotonic() - began, 1)
    found["command"] = " ".join(["python", *command])
    if code != 0:
        return found | {"why": "took too long" if code == TIMED_OUT else "", "output": output[-1500:]}
    lines = output.splitlines()
    if "pytest" in command and "passed" not in lines[-1]:
        return found | {"status": "skipped", "why": lines[-1]}
    return found | {"figure": json.loads(lines[-1]) if lines[-1].startswith("{") else lines[-1]}


def run_program(command: list[str], seconds: float) -> tuple[int, str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *extra_paths()])}
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        return TIMED_OUT, str(error.stderr)
    return done.returncode, done.stdout if done.returncode == 0 else done.stdout + done.stderr


def extra_paths() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def describe() -> dict:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {"date": time.strftime("%Y-%m-%d"), "hardware": hardware(), "versions": versions}


def hardware() -> str:
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().replace("\n", "; ")
    except (OSError, subprocess.CalledProcessError):
        return f"no GPU, {os.cpu_count()} cores"


if __name__ == "__main__":
    main()
