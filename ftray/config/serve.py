"""`kind: serve`: one endpoint, many adapters over one base."""

import ipaddress
from typing import Literal

from pydantic import Field, model_validator

from ftray.config.chat import ChatConfig
from ftray.config.engines import engine_kind, who_can
from ftray.errors import UserError
from ftray.plugins import PluginName
from ftray.schema import ByteSize, NonNegativeFloat, Place, PositiveFloat, PositiveInt, Strict, Text


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


MOST_RANK = 256


class EngineConfig(Strict):
    type: Literal["torch", "vllm"] | PluginName = "torch"
    """Or module:NAME of an `EngineKind` of one's own."""
    tensor_parallel: PositiveInt = 1
    """GPUs that share the base model (vllm)."""
    max_sequences: PositiveInt = 16
    context_tokens: PositiveInt = 2048
    kv_cache_tokens: PositiveInt = 16384
    max_prefill_tokens: PositiveInt = 512
    """Prompt tokens that may join one forward pass beside the decoding ones."""
    max_waiting: PositiveInt = 1024
    """Requests queued in a replica before new ones are told to come back (429)."""

    @model_validator(mode="after")
    def one_sequence_fits(self):
        if self.kv_cache_tokens < self.context_tokens:
            raise ValueError(
                f"kv_cache_tokens ({self.kv_cache_tokens}) must hold at least one sequence "
                f"of context_tokens ({self.context_tokens})"
            )
        return self


class AdaptersConfig(Strict):
    registry: Place = "registry"
    preload: list[Text] = Field(default_factory=list)
    host_budget: ByteSize = Field(default=2 * 2**30)
    """Adapters in memory."""
    device_budget: ByteSize = Field(default=2**30)
    """Of them, adapters that take part in forward passes."""
    max_rank: PositiveInt | None = None
    """null: 256; with vllm, whose slots have one size, the largest that is published when a replica starts, at least
    16."""
    dtype: Literal["auto", "bfloat16"] = "auto"
    """auto: their numbers as they are (vllm: the base's dtype). Rounded, they are half as large where it is float32."""

    @property
    def rank_limit(self) -> int:
        return MOST_RANK if self.max_rank is None else self.max_rank


class ReplicasConfig(Strict):
    min: PositiveInt = 1
    max: PositiveInt = 1
    gpus_each: NonNegativeFloat = 0
    cpus_each: NonNegativeFloat = 1
    upscale_delay_s: NonNegativeFloat = 10
    """One more when replicas have had more than engine.max_sequences requests each for so long, one less when fewer."""
    downscale_delay_s: NonNegativeFloat = 300
    drain_s: NonNegativeFloat = 30
    """A replica that goes has so long to end what it has begun."""
    max_surge_percent: int = Field(default=100, ge=0, le=100)
    """New replicas started beside the old ones when the endpoint is deployed again; 0: where there is no room for
    both."""

    @model_validator(mode="after")
    def ordered(self):
        if self.max < self.min:
            raise ValueError(f"max ({self.max}) must be at least min ({self.min})")
        return self


class TenantsConfig(Strict):
    database: Place | None = None
    """A file or postgresql://...: requests need keys (`ftray tenants`); None: open to all."""
    shared_prompts: list[Text] = Field(default_factory=list)
    """Adapters, or the base, whose prompts all tenants may have in common: their keys and values are computed once.
    Else a tenant's stay its own, so that nobody can find out by `cached_tokens` or the time what others ask."""


class CorsConfig(Strict):
    origins: list[Text] = Field(default_factory=list)
    """Web pages (https://chat.example.com) whose scripts may use this endpoint in a browser; "*": all of them."""


class LimitsConfig(Strict):
    request_timeout_s: PositiveFloat | None = None
    """An answer that takes longer ends with an error (504)."""
    body_bytes: ByteSize = Field(default=4 * 2**20)
    """A larger request is refused (413)."""
    body_timeout_s: PositiveFloat = 30
    """A client that sends its request more slowly is refused (408)."""
    header_bytes: ByteSize = Field(default=64 * 2**10)
    """More of them are refused (431)."""


class TelemetryConfig(Strict):
    access_log: Place | None = None
    """A directory for one JSON line per request; None: Ray's log directory of the node."""
    otlp_endpoint: Text | None = None
    """An OpenTelemetry collector (http://host:4318) that gets a span per request."""


class ServeConfig(Strict):
    kind: Literal["serve"]
    base_model: Place
    served_name: Text | None = None
    """What requests call the base; None: as base_model is written."""
    host: Text = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    chat: ChatConfig | None = None
    """Of the base, and of adapters that do not say how they were trained; null: as the base model says."""
    engine: EngineConfig = EngineConfig()
    adapters: AdaptersConfig = AdaptersConfig()
    replicas: ReplicasConfig = ReplicasConfig()
    open: bool = False
    """Without tenants, listen on other addresses than this machine's own too: whoever reaches it may ask anything."""
    allowed_hosts: list[Text] = Field(default_factory=list)
    """Names beside localhost under which an endpoint without tenants is asked on this machine."""
    unknown_fields: Literal["refuse", "ignore"] = "refuse"
    """Of requests: parameters that this endpoint does not have. ignore: they are logged."""
    cors: CorsConfig = CorsConfig()
    tenants: TenantsConfig = TenantsConfig()
    limits: LimitsConfig = LimitsConfig()
    telemetry: TelemetryConfig = TelemetryConfig()

    @property
    def is_local(self) -> bool:
        """It listens where only this machine reaches it."""
        return is_loopback(self.host)

    @model_validator(mode="after")
    def closed_by_default(self):
        if not self.is_local and self.tenants.database is None and not self.open:
            raise ValueError(
                f"host: {self.host} is reached from other machines, and without keys anybody may ask; give "
                "tenants.database (`ftray tenants`), host: 127.0.0.1, or open: true if that is meant"
            )
        return self

    @model_validator(mode="after")
    def engine_has_it(self):
        shared, name = self.engine.tensor_parallel, self.engine.type
        try:
            kind = engine_kind(name)
        except UserError as error:
            raise ValueError(str(error)) from None
        if shared > 1 and not kind.splits_base:
            raise ValueError(f"engine.tensor_parallel: {shared} needs engine.type {who_can('splits_base')}")
        if self.adapters.dtype != "auto" and not kind.keeps_adapter_dtype:
            raise ValueError(
                f"adapters.dtype: {self.adapters.dtype} needs engine.type {who_can('keeps_adapter_dtype')}; {name} has "
                "adapters in the base's dtype"
            )
        if shared > 1 and self.replicas.gpus_each != shared:
            raise ValueError(
                f"engine.tensor_parallel: {shared} GPUs share the base model, so replicas.gpus_each must be {shared} "
                f"(it is {self.replicas.gpus_each:g})"
            )
        return self
