"""Following a run from a test."""

from ftray.train.on_ray.trainer import Watcher


class Recorder:
    """A watcher that collects, and does things at steps."""

    def __init__(self, actions: dict | None = None):
        self.lines: list[str] = []
        self.actions = dict(actions or {})

    def watcher(self) -> Watcher:
        return Watcher(log=self.lines.append, on_metrics=self.on_metrics, on_start=lambda first, total: None)

    def on_metrics(self, records):
        due = [step for step in self.actions if any(record["step"] >= step for record in records)]
        if due:
            self.actions.pop(min(due))()
