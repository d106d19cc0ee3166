"""A run as one of its ranks has it: its directory there, its checkpoints, and how a save becomes one."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import ray.train

from ftray.errors import FtrayError
from ftray.storage import remove_unlisted
from ftray.storage.manifest import MANIFEST
from ftray.train.checkpoints.listing import CHECKPOINTS, Checkpoints, DirectoryCheckpoints
from ftray.train.checkpoints.stored import StoredCheckpoints
from ftray.train.engine.protocol import Ranks
from ftray.train.job import TrainJob
from ftray.train.runs.rank_directory import WorkerNotes, directory_of_rank
from ftray.train.runs.uri import is_stored


class RankRun(Protocol):
    @property
    def job(self) -> TrainJob:
        """As this rank works on it."""
        ...

    @property
    def checkpoints(self) -> Checkpoints: ...

    def begin(self) -> None:
        """Fetches what was noted before, and the data, where no disk has them."""
        ...

    def push_notes(self) -> None:
        """What this rank noted, to where the run lies. Raises `FtrayError`."""
        ...

    def upload(self, directory: Path, step: int) -> None:
        """A rank's files of a checkpoint, to where the run lies, beside the training."""
        ...

    def publish(self, ranks: Ranks, directory: Path, step: int) -> None:
        """Makes a rank's files part of the checkpoint of `step`. All ranks together; raises `FtrayError` on all of them
        or on none."""
        ...


@contextlib.contextmanager
def open_rank_run(job: TrainJob, *, rank: int) -> Iterator[RankRun]:
    """What a rank noted is where the run lies at the end, however it ends."""
    if not is_stored(job.uri):
        yield SharedRun(job, rank=rank)
        return
    directory = directory_of_rank(job.uri, rank, attempt=job.attempt)
    run = StoredRankRun(replace(job, run_directory=directory), rank=rank)
    try:
        yield run
    finally:
        run.close()
        shutil.rmtree(directory, ignore_errors=True)


class SharedRun:
    """On a disk that all ranks share."""

    def __init__(self, job: TrainJob, *, rank: int):
        self.job = job
        self.checkpoints = DirectoryCheckpoints(job.run_directory)
        self._rank = rank

    def begin(self) -> None: ...

    def push_notes(self) -> None: ...

    def upload(self, directory: Path, step: int) -> None: ...

    def publish(self, ranks: Ranks, directory: Path, step: int) -> None:
        """The one place that reports to Ray Train. The files move, since scratch and checkpoints share a disk; the
        manifest, which names those of all ranks, moves when they are all there: a rank may die at any point."""
        target = self.job.run_directory / CHECKPOINTS / f"step-{step}"
        problem = None
        try:
            move_files(directory, target)
        except OSError as error:
            problem = f"rank {self._rank}: {error}"
        if problems := [found for found in ranks.gather(problem) if found is not None]:
            raise FtrayError(f"the checkpoint of step {step} could not be completed: {problems[0]}")

        def complete(_: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
            if self._rank == 0:
                os.replace(directory / MANIFEST, target / MANIFEST)
                remove_unlisted(target)  # of an earlier save of this step, by more ranks
            return ray.train.Checkpoint(str(target))

        ray.train.report(
            {"step": step},
            checkpoint=ray.train.Checkpoint.from_directory(directory),
            checkpoint_dir_name=target.name,
            checkpoint_upload_fn=complete,
        )


def move_files(directory: Path, target: Path) -> None:
    """All but the manifest."""
    for path in [path for path in directory.rglob("*") if path.is_file() and path != directory / MANIFEST]:
        place = target / path.relative_to(directory)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, place)


class StoredRankRun:
    """In an object store: `job.run_directory` is this rank's own."""

    def __init__(self, job: TrainJob, *, rank: int):
        self.job = job
        self.checkpoints = StoredCheckpoints(job.uri)
        self._notes = WorkerNotes(job.uri, job.run_directory, rank=rank)

    def begin(self) -> None:
        self.job = self._notes.begin(self.job)

    def push_notes(self) -> None:
        self._notes.push_at_once()

    def upload(self, directory: Path, step: int) -> None:
        self.checkpoints.upload(directory, step)

    def publish(self, ranks: Ranks, directory: Path, step: int) -> None:
        """Every rank's files are there; the notes of the steps before come first."""
        problem = None
        if (directory / MANIFEST).is_file():  # rank 0
            try:
                self.push_notes()
                self.checkpoints.complete(directory, step, keep=self.job.config.checkpoint.keep)
            except (FtrayError, OSError) as error:
                problem = str(error)
        if problem := ranks.gather(problem)[0]:
            raise FtrayError(f"the checkpoint of step {step} could not be completed: {problem}")

    def close(self) -> None:
        self._notes.close()
