"""The replica as Ray Serve runs it."""

import contextlib
import logging
import multiprocessing
import os
import time
from typing import Any

import ray
from ray import serve

from ftray.config import ServeConfig
from ftray.serve.node_address import listen_on_node_address
from ftray.serve.replica.process_memory import (
    ask_for_huge_pages,
    give_back_free_memory,
    keep_few_arenas,
    keep_out_of_collections,
)
from ftray.serve.replica.replica import EngineReplica
from ftray.serve.telemetry.metrics import OF_REPLICAS
from ftray.serve.telemetry.ray_meter import RayMeter

log = logging.getLogger("ftray.serve")

TELLING_S = 0.5  # between an engine's end and its process'


class ReplicaDeployment(EngineReplica):
    def __init__(self, config: ServeConfig):
        listen_on_node_address()
        keep_few_arenas()
        ask_for_huge_pages()
        if config.engine.tensor_parallel > 1:  # vLLM's workers join this cluster; it would start one of its own
            os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
        super().__init__(config, meter=RayMeter(OF_REPLICAS), engine_failed=end_process)

    async def reconfigure(self, _: Any) -> None:
        """Ray Serve calls it before the replica takes requests."""
        await self.preload()
        keep_out_of_collections()

    async def look(self) -> dict[str, Any]:
        return await super().look() | {"id": serve.get_replica_context().replica_tag}

    async def record_routing_stats(self) -> dict[str, Any]:
        """Ray Serve asks every `STATS_PERIOD_S` and tells the routers."""
        await self.measure()
        return {"adapters": self.residency.resident_keys}

    def check_health(self) -> None:
        """Ray Serve calls it every few seconds."""
        super().check_health()
        give_back_free_memory()

    def __del__(self) -> None:
        """Ray Serve calls it when the replica goes."""
        with contextlib.suppress(AttributeError):  # it was never whole
            self.close()


def end_process(error: BaseException) -> None:
    """Of a replica whose engine has stopped, once its callers have heard it: Ray Serve replaces it. Until the health
    checks failed it would be routed to as the least busy."""
    log.critical("the engine has stopped", exc_info=error)
    time.sleep(TELLING_S)
    for child in multiprocessing.active_children():  # vLLM's, with the GPU's memory
        child.kill()
    os._exit(1)
