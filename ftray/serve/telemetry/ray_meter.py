"""The endpoint's metrics, on the page that Ray offers to Prometheus on every node."""

from ray.serve import metrics

from ftray.serve.telemetry.metrics import Metric


class RayMeter:
    """Ray adds the deployment and the replica to the labels."""

    def __init__(self, of: tuple[Metric, ...]):
        kinds = {"counter": metrics.Counter, "gauge": metrics.Gauge, "histogram": metrics.Histogram}
        self._made = {}
        for metric in of:
            bounds = {"boundaries": list(metric.bounds)} if metric.kind == "histogram" else {}
            self._made[metric.name] = kinds[metric.kind](
                metric.name, description=metric.description, tag_keys=metric.labels or None, **bounds
            )

    def add(self, metric: Metric, amount: float = 1, /, **labels: str) -> None:
        self._made[metric.name].inc(amount, tags=labels)

    def set(self, metric: Metric, value: float, /, **labels: str) -> None:
        self._made[metric.name].set(value, tags=labels)

    def observe(self, metric: Metric, value: float, /, **labels: str) -> None:
        self._made[metric.name].observe(value, tags=labels)
