"""What rank 0 keeps of a run's steps: metrics.jsonl, wandb, TensorBoard, and gauges of Ray's metrics."""

from pathlib import Path
from typing import Any

from ray.util.metrics import Gauge

from ftray.config import RunConfig
from ftray.tracking.metrics import MetricsLog
from ftray.tracking.tensorboard import TensorBoard
from ftray.tracking.wandb import Wandb


class Recorder:
    """Of one run; a fused group has one for each member."""

    def __init__(self, config: RunConfig, directory: Path, *, resume_step: int):
        self._metrics = MetricsLog(directory, resume_step=resume_step)
        self._wandb = Wandb(
            config.tracking,
            run_name=config.name,
            settings=config.model_dump(mode="json"),
            directory=directory,
            log=print,
        )
        self._gauges = Gauges(config.name)
        self._tensorboard = TensorBoard(directory, enabled=config.tracking.tensorboard, resume_step=resume_step)

    def record(self, entry: dict[str, Any]) -> None:
        self._metrics.append(entry)
        self._wandb.log(entry)
        self._tensorboard.log(entry)
        self._gauges.set(entry)

    def close(self) -> None:
        """May wait for an upload. Raises `OSError` when there is no room for the metrics' last lines."""
        try:
            self._metrics.close()
        finally:
            self._wandb.finish()
            self._tensorboard.close()


class Gauges:
    """`ftray_step`, `ftray_loss`, ... by run, for the metrics of Ray's dashboard and Prometheus."""

    SHOWN = ("step", "loss", "eval_loss", "grad_norm", "learning_rate", "tokens_per_s", "mfu")

    def __init__(self, run: str):
        self._tags = {"run": run}
        self._gauges = {name: Gauge(f"ftray_{name}", tag_keys=("run",)) for name in self.SHOWN}

    def set(self, record: dict[str, Any]) -> None:
        for name, gauge in self._gauges.items():
            if name in record:
                gauge.set(record[name], self._tags)
