"""Ray Serve's request router for engine replicas: `placement.py` with what Serve knows of them."""

from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from ftray.serve.routing.placement import ReplicaView, ranked


class WarmFirstRouter(RequestRouter):
    def initialize_state(self, **kwargs: Any) -> None:
        self._spread_at: int = kwargs["spread_at"]

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        by_id = {replica.replica_id.to_full_id_str(): replica for replica in candidate_replicas}
        if not by_id:
            return []
        views = [
            ReplicaView(
                id=name,
                adapters=frozenset((replica.routing_stats or {}).get("adapters", ())),
                num_requests=self.replica_queue_len_cache.get(replica.replica_id) or 0,
            )
            for name, replica in by_id.items()
        ]
        job = pending_request.args[0] if pending_request is not None and pending_request.args else None
        groups = ranked(getattr(job, "adapter", None), views, spread_at=self._spread_at)
        return [[by_id[name] for name in group] for group in groups if group]
