"""`ftray train --profile N`: a trace of N steps of rank 0, for https://ui.perfetto.dev or chrome://tracing."""

from pathlib import Path
from typing import Any

import torch

PROFILE = "profile"  # in the run directory
SKIPPED_STEPS = 2  # the first steps allocate and warm up


class StepProfiler:
    """Traces nothing when `num_steps` is 0 or on other ranks."""

    def __init__(self, run_directory: Path, *, num_steps: int, rank: int):
        self.path = run_directory / PROFILE / "rank-0.trace.json.gz"
        self._profiler: Any = None
        if num_steps == 0 or rank != 0:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(
            activities=activities,
            schedule=torch.profiler.schedule(
                skip_first=SKIPPED_STEPS - 1, wait=0, warmup=1, active=num_steps, repeat=1
            ),
            on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(self.path)),
            record_shapes=True,
        )
        self._profiler.start()

    def step(self) -> None:
        """At the end of a training step."""
        if self._profiler is not None:
            self._profiler.step()

    def close(self) -> None:
        if self._profiler is not None:
            self._profiler.stop()  # writes what there is, where the run ended before the last traced step
