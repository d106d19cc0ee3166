"""An inference engine of one's own: ftray's, with a line in the replica's log for each step that took long."""

import logging
import time
from typing import Any

from ftray.config.engines import EngineKind
from ftray.infer.torch_engine.engine import TorchEngine

SLOW_S = 0.5
log = logging.getLogger("ftray.serve")


class WatchedEngine(TorchEngine):
    def step(self) -> list[Any]:
        began = time.perf_counter()
        events = super().step()
        if (seconds := time.perf_counter() - began) > SLOW_S:
            log.warning("a step of %d tokens took %.2f s", len(events), seconds)
        return events


WATCHED = EngineKind("configs.own_code.watched_engine:WatchedEngine")
