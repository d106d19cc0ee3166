"""One sweep of 8 trials, rank and rate, on the quickstart's intents, as a user starts it: wall time from the command to
the answer, and the peak memory of its driver and workers."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

from ftray.tracking.metrics import read_metrics

ROOT = Path(__file__).parents[2]
TRIALS, STEPS, EVALUATE_EVERY = 8, 12, 4
LONG_STEPS, LONG_EVALUATE_EVERY = 60, 2  # the quickstart's own two epochs
SMALL, SMALL_STEPS = ", batch.examples_per_step: 2", 30  # about 73 tokens a step
EVALUATION_ROWS = 24  # of the 120: on a CPU evaluations would take a third of the time, the same on all sides
SPACE = """
  adapter.rank: [4, 16]
  adapter.alpha: {expression: 2 * adapter.rank}
  optimizer.learning_rate: {log_uniform: [2e-4, 5e-3], points: 4}
"""


def measure(search: str, *, overrides: str = "", steps: int = STEPS, evaluate_every: int = EVALUATE_EVERY) -> None:
    """Prints one line of JSON. `tokens_per_s`: all that the 8 trials would train on to their ends, over the wall time,
    so that a scheduler that stops trials is as much faster as it is sooner."""
    with tempfile.TemporaryDirectory() as scratch:
        config = Path(scratch) / "sweep.yaml"
        rows = (ROOT / "configs/quickstart/data/eval.jsonl").read_text().splitlines(keepends=True)
        (Path(scratch) / "eval.jsonl").write_text("".join(rows[:EVALUATION_ROWS]))
        config.write_text(
            f"kind: sweep\nname: s\nrun: {ROOT}/configs/quickstart/run.yaml\nspace:{SPACE}search: {{{search}}}\n"
            f"overrides: {{epochs: null, max_steps: {steps}, data.eval: {scratch}/eval.jsonl, "
            f"runs_dir: {scratch}/runs, registry: {scratch}/registry, workers.count: 1, "
            f"zero.stage: 0, evaluation.every: {evaluate_every}, evaluation.samples: 0{overrides}}}\n"
        )
        began, began_at = time.perf_counter(), time.time()
        command = [str(Path(sys.executable).parent / "ftray"), "sweep", str(config)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        watch = PeakMemory(process.pid)
        out, _ = process.communicate()
        seconds = time.perf_counter() - began
        if process.returncode != 0:
            sys.exit(out)
        trials = Path(scratch) / "runs/s/trials"
        whole = [
            json.loads((path / "result.json").read_text())
            for path in trials.glob("t*")
            if (path / "result.json").exists()
        ]
        records = [record for path in sorted(trials.glob("t*")) for record in read_metrics(path) if "loss" in record]
        first = min(records, key=lambda record: record["time"])
        one = next(path for path in trials.glob("t*") if (path / "result.json").exists())
        tokens = TRIALS * sum(record["num_tokens"] for record in read_metrics(one) if "loss" in record)
        reported = {
            "seconds": round(seconds, 1),
            "tokens_per_s": round(tokens / seconds, 1),
            "peak_gib": watch.stop(),
            "finished": len(whole),
            "start_s": round(first["time"] - first["seconds"] - began_at, 1),
            "step_s": round(statistics.fmean(record["seconds"] for record in records), 3),  # in a group: its share
            "best_eval_loss": round(min(result["final_eval_loss"] for result in whole), 4),
        }
        print(json.dumps(reported))


class PeakMemory:
    """Of a driver and Ray's workers under it: proportional set size, sampled. Ray's own services are the same on all
    sides and left out."""

    def __init__(self, pid: int):
        self._root = psutil.Process(pid)
        self._peak = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def stop(self) -> float:
        self._over.set()
        self._thread.join()
        return round(self._peak / 2**30, 2)

    def _sample(self) -> None:
        while not self._over.wait(0.5):
            used = 0
            try:
                for process in [self._root, *self._root.children(recursive=True)]:
                    if process == self._root or "ray::" in " ".join(process.cmdline()):
                        used += process.memory_full_info().pss
            except psutil.Error:
                continue
            self._peak = max(self._peak, used)


CORES = os.cpu_count() or 1
