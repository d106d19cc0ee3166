"""Saving without stopping the training: a snapshot is copied at once, a thread writes it, and at the end of a later
step, the same on every rank, it becomes a checkpoint.

A save that fails (a full disk) is told and left out; the run goes on and tries again at the next one. Only a failure of
the last save ends the run: without it the result would be lost.
"""

import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from ftray.config import RunConfig
from ftray.errors import FtrayError
from ftray.model.base import BaseModel
from ftray.storage import FileEntry
from ftray.train.checkpoints.checkpoint import Snapshot, complete_checkpoint, take_snapshot, write_snapshot
from ftray.train.checkpoints.listing import TrainerState
from ftray.train.engine.protocol import TrainingEngine, all_ranks

# (this rank's directory, step): makes its files part of checkpoints/step-N. Called on all ranks together; raises
# `FtrayError` on all of them or on none.
Publish = Callable[[Path, int], None]
# (this rank's directory, step): to where checkpoints lie, when that is not this disk; beside the training.
Upload = Callable[[Path, int], None]
# (step, what went wrong)
OnFailure = Callable[[int, str], None]


class Saver:
    def __init__(
        self,
        engine: TrainingEngine,
        config: RunConfig,
        base: BaseModel,
        *,
        data_digest: str,
        scratch: Path,
        publish: Publish,
        on_failure: OnFailure,
        upload: Upload,
    ):
        self._engine = engine
        self._config = config
        self._base = base
        self._data_digest = data_digest
        self._rank = engine.rank
        self._directory = scratch / f"rank-{engine.rank}"
        self._publish = publish
        self._upload = upload
        self._on_failure = on_failure
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: tuple[Snapshot, Future[list[FileEntry]]] | None = None

    def begin(self, step: int) -> None:
        """Copies the state and returns; the files are written meanwhile. All ranks call it."""
        self.finish(last=False)
        state = TrainerState(step, self._data_digest, self._engine.world_size, self._config.zero.stage)
        snapshot = take_snapshot(self._engine, self._config, state, rank=self._rank)
        self._pending = snapshot, self._writer.submit(self._write, snapshot)

    def poll(self) -> None:
        """At the end of a step: completes the save if every rank has written its files."""
        if self._pending is not None and all_ranks(self._engine, self._pending[1].done()):
            self.finish(last=False)

    def finish(self, *, last: bool) -> None:
        """Waits for the pending save and completes it. With `last` a failure is raised."""
        if self._pending is None:
            return
        snapshot, future = self._pending
        self._pending = None
        error = future.exception()
        written = self._engine.gather(str(error) if error is not None else future.result())
        failed = {rank: outcome for rank, outcome in enumerate(written) if isinstance(outcome, str)}
        if failed:
            rank, reason = next(iter(failed.items()))
            message = f"the checkpoint of step {snapshot.state.step} could not be written by rank {rank}: {reason}"
            if last:
                raise FtrayError(f"{message}; make room, and the same command goes on")
            self._on_failure(snapshot.state.step, message)
        else:
            if self._rank == 0:
                files = [entry for entries in written for entry in entries]
                complete_checkpoint(self._directory, files, self._config, snapshot.state)
            try:
                self._publish(self._directory, snapshot.state.step)
            except FtrayError as error:
                if last:
                    raise
                self._on_failure(snapshot.state.step, str(error))
        shutil.rmtree(self._directory, ignore_errors=True)

    def close(self) -> None:
        self._writer.shutdown(wait=True)

    def _write(self, snapshot: Snapshot) -> list[FileEntry]:
        shutil.rmtree(self._directory, ignore_errors=True)
        files = write_snapshot(self._directory, snapshot, self._config, self._base, rank=self._rank)
        self._upload(self._directory, snapshot.state.step)
        return files
