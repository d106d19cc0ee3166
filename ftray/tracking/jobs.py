"""What lies beside the runs in `runs_dir`: sweeps and pipelines, as far as their directories tell."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ftray.errors import DamagedError
from ftray.storage import read_json
from ftray.tracking.events import read_whole_lines
from ftray.tracking.runs import DAMAGED, FINISHED
from ftray.tracking.status import INTERRUPTED, RUNNING

SWEEP, JOURNAL, PIPELINE = "sweep.json", "trials.jsonl", "pipeline.json"
KINDS = {SWEEP: "sweep", PIPELINE: "pipeline"}  # by the file that makes a directory one


@dataclass(frozen=True)
class JobSummary:
    kind: str
    name: str
    status: str
    done: str  # in words
    began: float


def find_jobs(runs_dir: Path, *, is_driven: Callable[[str], bool] = lambda name: False) -> list[JobSummary]:
    found = [(path, kind) for file, kind in KINDS.items() for path in runs_dir.glob(f"*/{file}")]
    return [summary_of(path, kind, is_driven=is_driven(path.parent.name)) for path, kind in found]


def summary_of(path: Path, kind: str, *, is_driven: bool) -> JobSummary:
    name, began = path.parent.name, path.stat().st_mtime
    try:
        content = read_json(path)
        done, is_over = sweep_progress(path.parent, content) if kind == "sweep" else pipeline_progress(content)
    except (DamagedError, KeyError, TypeError, AttributeError) as error:
        return JobSummary(kind, name, DAMAGED, str(error) if isinstance(error, DamagedError) else f"{path}", began)
    return JobSummary(kind, name, RUNNING if is_driven else FINISHED if is_over else INTERRUPTED, done, began)


def sweep_progress(directory: Path, described: dict) -> tuple[str, bool]:
    """In words, and whether each of its runs has ended."""
    events = Counter(event.get("event") for event in read_whole_lines(directory / JOURNAL))
    runs = events["trial"] * len(described["sweep"]["seeds"])
    return f"{events['end']} of {runs} runs ended", 0 < runs <= events["end"]


def pipeline_progress(record: dict) -> tuple[str, bool]:
    """In words, and whether it has come to its decision."""
    if "conditions" not in record:
        return "has not measured yet" if "scores" not in record else "has measured", False
    done = f"published {record['version']}" if record["version"] else f"published nothing, {record['product']} stands"
    return done, True
