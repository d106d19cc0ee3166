"""A fused member whose run directory lies in an object store: rank 0 has it on its machine, and keeps both alike, as
the driver and rank 0 of a run of its own would (train/runs/store.py). The sweep's driver has the lease for all."""

from pathlib import Path

from ftray.config import RunConfig
from ftray.sweep.store import forget_leftover
from ftray.train.checkpoints.checkpoint import CHECKPOINTS
from ftray.train.runs.directory import RunDirectory, open_run_directory
from ftray.train.runs.finalize import artifact_of
from ftray.train.runs.store import StoredRun, WorkerNotes


class StoredMember:
    def __init__(self, config: RunConfig):
        self._config = config
        self._run = StoredRun(config.runs_dir, config.name)
        self._notes = WorkerNotes(self._run.url, self._run.directory, rank=0)

    @property
    def url(self) -> str:
        return self._run.url

    def open(self, *, is_new: bool) -> RunDirectory:
        """As the store has it; a checkpoint that its manifest does not prove is one no longer. `is_new`: the sweep has
        heard nothing of it. Raises `UserError`."""
        if is_new:
            forget_leftover(self._config)
        self._run.checkpoints.forget_damaged()
        self._run.fetch()
        return open_run_directory(self._config, fresh=False, stored=self._run)

    def begin(self) -> None:
        """From now on its notes go to the store, and a request to stop comes from there."""
        self._run.push()
        self._notes.follow()

    def save(self, step: int) -> None:
        """The checkpoint that lies in its directory, whole. Raises `FtrayError`."""
        directory = self._run.directory / CHECKPOINTS / f"step-{step}"
        self._run.checkpoints.upload(directory, step)
        self._notes.push_at_once()  # those of the steps before come first
        self._run.checkpoints.complete(directory, step, keep=self._config.checkpoint.keep)

    def fetch_artifact(self) -> Path | None:
        """Of the newest checkpoint that the store has, as `finish` wants it."""
        checkpoint = self._run.newest_checkpoint()
        if checkpoint is not None:
            self._run.checkpoints.fetch_artifact(checkpoint, whole=False)
        return checkpoint

    def close(self) -> None:
        """What was noted is in the store afterwards."""
        self._notes.close()

    def store_artifact(self) -> None:
        """After `finish` has made it."""
        self._run.store_artifact(self._run.directory / artifact_of(self._config))
