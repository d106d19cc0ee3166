"""The run directory of a fused member, as rank 0 keeps it: what the driver and rank 0 of a run of its own would do
(train/runs/). The sweep's driver has the lease for all."""

from pathlib import Path

from ftray.config import RunConfig
from ftray.train.checkpoints.listing import CHECKPOINTS, newest_whole_checkpoint
from ftray.train.checkpoints.stored import StoredCheckpoints
from ftray.train.runs.disk import DiskRun
from ftray.train.runs.handle import RunHandle
from ftray.train.runs.object_store import StoredRun
from ftray.train.runs.rank_directory import WorkerNotes
from ftray.train.runs.store import run_store
from ftray.train.runs.uri import is_stored


class MemberRun:
    """On a disk that all nodes see. Making one raises `UserError`."""

    def __init__(self, config: RunConfig, *, is_new: bool):
        """`is_new`: the sweep has heard nothing of it."""
        self._config = config
        self._store = run_store(config.runs_dir)
        if is_new:
            self._store.forget_leftover(config)
        self.handle = self._open()

    def _open(self) -> RunHandle:
        return DiskRun(self._config)

    def begin(self) -> None:
        """From now on what it notes is where the run lies, and a request to stop comes from there."""

    def keep(self, step: int) -> None:
        """The checkpoint that lies in its directory, whole, where the run lies. Raises `FtrayError`."""

    def stop_noting(self) -> None:
        """What was noted is where the run lies afterwards."""

    def last_checkpoint(self) -> Path | None:
        """With all that the result is made of."""
        return newest_whole_checkpoint(self.handle.path)

    def drop_checkpoints(self) -> None:
        self._store.drop_checkpoints(self._config.name)

    def leave(self) -> None:
        """At the very end."""
        self._store.forget_local_copy(self._config.name)


class StoredMemberRun(MemberRun):
    """In an object store: rank 0 has it on its machine, and keeps both alike."""

    _run: StoredRun

    def _open(self) -> RunHandle:
        """As the store has it; a checkpoint that its manifest does not prove is one no longer."""
        StoredCheckpoints(self._store.uri(self._config.name)).forget_damaged()
        self._run = StoredRun(self._config)
        self._notes = WorkerNotes(self._run.uri, self._run.path, rank=0)
        return self._run

    def begin(self) -> None:
        self._run.push()
        self._notes.follow()

    def keep(self, step: int) -> None:
        directory = self._run.path / CHECKPOINTS / f"step-{step}"
        self._run.checkpoints.upload(directory, step)
        self._notes.push_at_once()  # those of the steps before come first
        self._run.checkpoints.complete(directory, step, keep=self._config.checkpoint.keep)

    def stop_noting(self) -> None:
        self._notes.close()

    def last_checkpoint(self) -> Path | None:
        return super().last_checkpoint() or self._run.newest_checkpoint()


def member_run(config: RunConfig, *, is_new: bool) -> MemberRun:
    return (StoredMemberRun if is_stored(config.runs_dir) else MemberRun)(config, is_new=is_new)
