"""`ftray.train` and the run that it leaves."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftray.api.config import read_config, rows_file
from ftray.api.frame import as_frame
from ftray.api.interrupt import nothing_left
from ftray.config import RunConfig
from ftray.errors import NotFoundError, UserError
from ftray.storage import read_json
from ftray.train.hooks.own_callbacks import Callback
from ftray.train.runs.uri import is_stored


@dataclass(frozen=True)
class Run:
    """A run directory, finished or not."""

    config: RunConfig
    directory: Path  # on this machine

    @staticmethod
    def open(directory: str | Path) -> "Run":
        """An earlier run, by its directory. Raises `NotFoundError`."""
        path = Path(directory)
        if not (path / "config.json").is_file():
            raise NotFoundError(f"{path}: holds no run (no config.json)")
        return Run(RunConfig.model_validate(read_json(path / "config.json")), path.absolute())

    @property
    def result(self) -> dict[str, Any] | None:
        """What result.json says; None while the run is not finished."""
        path = self.directory / "result.json"
        return read_json(path) if path.is_file() else None

    @property
    def metrics(self) -> Any:
        """A pandas DataFrame with a row for each step and evaluation; without pandas a list of dicts."""
        from ftray.tracking.metrics import read_metrics

        return as_frame(read_metrics(self.directory))

    @property
    def adapter(self) -> Path | None:
        """The PEFT directory that the run leaves; None for full fine-tuning, and before the end."""
        path = self.directory / "adapter"
        return path if (path / "manifest.json").is_file() else None

    @property
    def model(self) -> Path | None:
        """The Hugging Face directory that full fine-tuning leaves."""
        path = self.directory / "model"
        return path if (path / "manifest.json").is_file() else None

    @property
    def report(self) -> Path:
        return self.directory / "report.html"

    def publish(self, *, name: str | None = None, registry: str | None = None, alias: str | None = None) -> str:
        """The adapter as a version of `name` (None: the run's) in a registry (None: the config's), once for the same
        files; `alias` then points to it. Returns NAME@VERSION."""
        from ftray.artifacts.publish import publish_if_new, publish_once
        from ftray.registry import Registry

        if self.adapter is None:
            raise UserError(f"{self.directory}: holds no adapter to publish")
        store, given = Registry(registry or self.config.registry), name or self.config.name
        if alias is None:
            return str(publish_if_new(store, given, self.adapter))
        return str(publish_once(store, given, self.adapter, alias=alias))

    def resume(self, *, callbacks: Sequence[Callback] = (), log: Callable[[str], None] = print) -> "Run":
        """Goes on from the last checkpoint, as the same command would, also where the directory was moved; a finished
        run stays as it is."""
        place = {"runs_dir": str(self.directory.parent), "name": self.directory.name}
        return train(self.config.model_copy(update=place), callbacks=callbacks, log=log)


def train(
    config: RunConfig | dict[str, Any] | str | Path,
    *overrides: str,
    data: Any = None,
    eval_data: Any = None,
    callbacks: Sequence[Callback] = (),
    fresh: bool = False,
    log: Callable[[str], None] = print,
) -> Run:
    """Fine-tunes, and returns the finished run; the same call again goes on where it stood.

    `config`: a file of `kind: run`, its keys as a dict, or the object. `data`, `eval_data`: instead of `data.train` and
    `data.eval`: a path, or rows as dicts, a `datasets.Dataset` or a DataFrame. `callbacks`: get each record of
    metrics.jsonl; one that raises stops the run, which saves first. `fresh`: sets an earlier run of this name aside.
    Raises `UserError` (and its `ConfigError`) before anything costly, `InterruptedRunError` when it was stopped,
    `FtrayError` when the work failed.
    """
    run = read_run(config, overrides, data=data, eval_data=eval_data)
    from ftray.artifacts.resolve import resolve_start
    from ftray.train.job import request_stop
    from ftray.train.launch import launch
    from ftray.train.on_ray.trainer import Watcher
    from ftray.train.prepare import prepare

    prepared = resolve_start(prepare(run, fresh=fresh, callbacks=callbacks))
    run = prepared.config
    directory = (Path(run.runs_dir) / run.name).absolute()
    watcher = Watcher(
        log=log, on_metrics=lambda records: None, on_start=lambda first, total: log(f"{total} steps, from {first + 1}")
    )
    with nothing_left(lambda: request_stop(directory)):
        launch(prepared, watcher)
    return Run(run, directory)


def read_run(config: Any, overrides: Sequence[str], *, data: Any, eval_data: Any) -> RunConfig:
    """The config with the caller's rows in it."""
    tree = config
    if isinstance(config, dict) and data is not None:  # which the schema asks for
        tree = config | {"data": {"train": "given", **config.get("data", {})}}
    run: RunConfig = read_config(tree, overrides, kind="run")
    if is_stored(run.runs_dir):
        raise UserError("runs_dir: a run in a store is started with `ftray train`; give a directory here")
    given = {"train": data, "eval": eval_data}
    files = {key: rows_file(v, runs_dir=run.runs_dir, key=f"data.{key}") for key, v in given.items() if v is not None}
    return run.model_copy(update={"data": run.data.model_copy(update=files)})
