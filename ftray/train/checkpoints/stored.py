"""`checkpoints/step-N/` of a run in an object store. One counts once its manifest is there, which is written last."""

from collections.abc import Iterable
from pathlib import Path

from ftray.errors import DamagedError, FtrayError
from ftray.storage import Manifest, ObjectStore, local_copies
from ftray.storage.cache import cache_directory
from ftray.storage.manifest import MANIFEST, check_objects
from ftray.train.checkpoints.listing import ADAPTER, CHECKPOINTS, TRAINER_STATE, Log, check_step, first_whole, step_of


class StoredCheckpoints:
    def __init__(self, run_url: str):
        self._url = f"{run_url}/{CHECKPOINTS}"
        self._store = ObjectStore(self._url)

    def upload(self, directory: Path, step: int) -> None:
        """A rank's files, before the manifest."""
        self._store.write_files(directory, f"step-{step}", without=(MANIFEST,))

    def complete(self, directory: Path, step: int, *, keep: int) -> None:
        """Rank 0, when all ranks' files are there. The `keep` newest stay; of the others the manifest goes first."""
        content = (directory / MANIFEST).read_bytes()
        self._store.write(f"step-{step}/{MANIFEST}", content)
        named = {f"step-{step}/{entry.path}" for entry in Manifest.model_validate_json(content).files}
        named.add(f"step-{step}/{MANIFEST}")
        keys = [found.key for found in self._store.entries()]
        # A later step than this one was damaged, or training would have gone on from it.
        kept = {f"step-{number}" for number in [n for n in steps_of(keys) if n < step][: keep - 1]}
        for key in sorted(keys, key=lambda key: not key.endswith(f"/{MANIFEST}")):
            if key not in named and key.partition("/")[0] not in kept:
                self._store.delete(key)

    def forget_damaged(self) -> None:
        """Those that are newer than the newest whole one, which this machine then has."""
        for uri in self.list():
            try:
                self.open(uri, share=(0, 1))
                return
            except DamagedError:
                self._store.delete(f"{uri.rpartition('/')[2]}/{MANIFEST}")

    def drop(self) -> None:
        """All of them."""
        for key in sorted((found.key for found in self._store.entries()), key=lambda key: not key.endswith(MANIFEST)):
            self._store.delete(key)

    def list(self) -> list[str]:
        """Their URLs, newest first."""
        return [f"{self._url}/step-{step}" for step in steps_of(found.key for found in self._store.entries())]

    def open(self, uri: str, *, share: tuple[int, int]) -> Path:
        """This machine's copy, which one process fetches. Raises `FtrayError` where the manifest does not prove it."""
        return local_copies(cache_directory()).fetch(uri)

    def newest(self, directory: Path, *, log: Log | None = None) -> Path | None:
        """What the driver needs to know of the newest whole one, as far as names and sizes tell: its manifest and
        trainer.json, in `directory`/checkpoints/step-N. Raises `DamagedError` where none is whole."""
        sizes = {found.key: found.size for found in self._store.entries()}

        def taken(name: str) -> Path:
            check_objects(self._store, name, sizes=sizes)
            checkpoint = self._take(directory / CHECKPOINTS / name, [MANIFEST, TRAINER_STATE])
            check_step(checkpoint)
            return checkpoint

        return first_whole([f"step-{step}" for step in steps_of(sizes)], opened=taken, log=log)

    def fetch_artifact(self, checkpoint: Path, *, whole: bool) -> None:
        """Fetches to where `newest` lies what the run's result is made of: the adapter, or the `whole` state."""
        files = Manifest.model_validate_json((checkpoint / MANIFEST).read_bytes()).files
        self._take(checkpoint, [entry.path for entry in files if whole or entry.path.startswith(f"{ADAPTER}/")])

    def _take(self, checkpoint: Path, files: Iterable[str]) -> Path:
        for file in files:
            key = f"{checkpoint.name}/{file}"
            found = self._store.find(key)
            if found is None:
                raise FtrayError(f"{self._url}/{key}: is gone from the store")
            self._store.download(found, checkpoint / file)
        return checkpoint


def steps_of(keys: Iterable[str]) -> list[int]:
    """Of the manifests among them, newest first."""
    names = (key.removesuffix(f"/{MANIFEST}") for key in keys if key.endswith(f"/{MANIFEST}"))
    return sorted((step for name in names if (step := step_of(name)) is not None), reverse=True)
