"""What the endpoint measures of itself, by model and tenant, and of each replica; Prometheus' names and units.

A meter carries them there (`ray_meter.py`); without one nothing is kept. On Ray's metrics page every name begins with
`ray_`, and counters end with `_total`.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

from ftray.infer.protocol import EngineStats
from ftray.serve.replica.residency import AdapterResidency, ResidencyEvent

# Every label value is a time series in Prometheus, and histograms are a dozen: names beyond so many are told as OTHER.
MAX_LABELS = 1000
OTHER = "(other)"


@dataclass(frozen=True)
class Metric:
    name: str
    kind: Literal["counter", "gauge", "histogram"]
    description: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()  # of a histogram's buckets


SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 5)

ASKED = ("model", "tenant")
REQUESTS = Metric("ftray_requests", "counter", "Requests that have ended, by HTTP status", (*ASKED, "status"))
CUT = Metric("ftray_requests_cut", "counter", "Answers that ended early: a failure, or the client left", ASKED)
PROMPT_TOKENS = Metric("ftray_prompt_tokens", "counter", "Prompt tokens", ASKED)
CACHED_TOKENS = Metric("ftray_prompt_tokens_cached", "counter", "Prompt tokens found in the KV cache", ASKED)
COMPLETION_TOKENS = Metric("ftray_completion_tokens", "counter", "Tokens generated", ASKED)
ADAPTER_WAIT = Metric(
    "ftray_adapter_wait_seconds", "histogram", "A request's wait for its adapter to be in memory", ASKED, SECONDS
)
QUEUE = Metric("ftray_queue_seconds", "histogram", "Wait in the engine's queue", ASKED, SECONDS)
FIRST_TOKEN = Metric(
    "ftray_time_to_first_token_seconds", "histogram", "From the request to its first token", ASKED, SECONDS
)
# Its name until 0.2, for one release more.
FIRST_TOKEN_OLD = Metric("ftray_first_token_seconds", "histogram", "The old name, until 0.3", ASKED, SECONDS)
PER_TOKEN = Metric("ftray_token_seconds", "histogram", "Mean time between an answer's tokens", ASKED, TOKEN_SECONDS)
LATENCY = Metric("ftray_request_seconds", "histogram", "From the request to its end", ASKED, SECONDS)

LOOKUPS = Metric("ftray_adapter_lookups", "counter", "Adapters asked for, by whether in memory", ("adapter", "result"))
LOADS = Metric("ftray_adapter_loads", "counter", "Adapters loaded into memory", ("adapter", "result"))
LOAD_SECONDS = Metric("ftray_adapter_load_seconds", "histogram", "Time to load an adapter", (), SECONDS)
EVICTIONS = Metric("ftray_adapter_evictions", "counter", "Adapters that made room for others", ("adapter",))
RESIDENT = Metric("ftray_adapter_resident", "gauge", "1 where the adapter is in memory", ("adapter",))
ADAPTERS = Metric("ftray_adapters", "gauge", "Adapters in memory, and of them on the device", ("tier",))
ADAPTER_BYTES = Metric("ftray_adapter_bytes", "gauge", "Bytes of adapters", ("tier",))
ADAPTER_BUDGET = Metric("ftray_adapter_budget_bytes", "gauge", "adapters.host_budget")
RUNNING = Metric("ftray_sequences_running", "gauge", "Answers that the engine computes now")
WAITING = Metric("ftray_sequences_waiting", "gauge", "Answers that wait for the engine")
PREEMPTIONS = Metric("ftray_preemptions", "counter", "Answers pushed back: no KV cache left, or a tenant had no place")
KV_USED = Metric("ftray_kv_tokens_used", "gauge", "Tokens in the KV cache's used pages")
KV_TOTAL = Metric("ftray_kv_tokens_total", "gauge", "Tokens that the KV cache has room for")

OF_REQUESTS = (
    REQUESTS,
    CUT,
    PROMPT_TOKENS,
    CACHED_TOKENS,
    COMPLETION_TOKENS,
    ADAPTER_WAIT,
    QUEUE,
    FIRST_TOKEN,
    FIRST_TOKEN_OLD,
    PER_TOKEN,
    LATENCY,
)
OF_REPLICAS = (
    LOOKUPS,
    LOADS,
    LOAD_SECONDS,
    EVICTIONS,
    RESIDENT,
    ADAPTERS,
    ADAPTER_BYTES,
    ADAPTER_BUDGET,
    RUNNING,
    WAITING,
    PREEMPTIONS,
    KV_USED,
    KV_TOTAL,
)


class Meter(Protocol):
    def add(self, metric: Metric, amount: float = 1, /, **labels: str) -> None:
        """To a counter."""
        ...

    def set(self, metric: Metric, value: float, /, **labels: str) -> None: ...

    def observe(self, metric: Metric, value: float, /, **labels: str) -> None: ...


class Unmetered:
    def add(self, metric: Metric, amount: float = 1, /, **labels: str) -> None: ...

    def set(self, metric: Metric, value: float, /, **labels: str) -> None: ...

    def observe(self, metric: Metric, value: float, /, **labels: str) -> None: ...


UNMETERED = Unmetered()


class Names:
    """The first so many names are told apart."""

    def __init__(self, limit: int = MAX_LABELS):
        self._limit = limit
        self._seen: set[str] = set()

    def __call__(self, name: str) -> str:
        if name not in self._seen and len(self._seen) < self._limit:
            self._seen.add(name)
        return name if name in self._seen else OTHER


class AdapterMetrics:
    """What `residency.py` signals."""

    def __init__(self, meter: Meter):
        self._meter = meter
        self._adapters = Names()

    def note(self, event: ResidencyEvent, key: str, seconds: float) -> None:
        adapter = self._adapters(key)
        match event:
            case "hit" | "miss":
                self._meter.add(LOOKUPS, adapter=adapter, result=event)
            case "loaded":
                self._meter.add(LOADS, adapter=adapter, result="ok")
                self._meter.observe(LOAD_SECONDS, seconds)
            case "failed":
                self._meter.add(LOADS, adapter=adapter, result="failed")
            case "evicted":
                self._meter.add(EVICTIONS, adapter=adapter)


class EngineMetrics:
    """Gauges are told each time: Ray forgets those that are not."""

    def __init__(self, meter: Meter):
        self._meter = meter
        self._preemptions = 0
        self._adapters = Names()

    def measure(self, stats: EngineStats, residency: AdapterResidency) -> None:
        for adapter in {self._adapters(key) for key in residency.resident_keys} - {OTHER}:
            self._meter.set(RESIDENT, 1, adapter=adapter)
        self._meter.set(ADAPTERS, len(residency.resident_keys), tier="host")
        self._meter.set(ADAPTERS, len(stats.adapters_on_device), tier="device")
        self._meter.set(ADAPTER_BYTES, residency.resident_bytes, tier="host")
        self._meter.set(ADAPTER_BYTES, stats.device_adapter_bytes, tier="device")
        self._meter.set(ADAPTER_BUDGET, residency.budget_bytes)
        self._meter.set(RUNNING, stats.num_running)
        self._meter.set(WAITING, stats.num_waiting)
        self._meter.set(KV_USED, stats.kv_tokens_used)
        self._meter.set(KV_TOTAL, stats.kv_tokens_total)
        if stats.num_preemptions > self._preemptions:
            self._meter.add(PREEMPTIONS, stats.num_preemptions - self._preemptions)
            self._preemptions = stats.num_preemptions
