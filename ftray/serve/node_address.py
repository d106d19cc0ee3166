"""Where a deployment's process listens for the endpoint's other processes."""

from typing import Any

import ray
from ray.serve._private import replica as ray_replica  # no public one


def listen_on_node_address() -> None:
    """On the address by which Ray knows the node, and no other: 127.0.0.1 in a session of our own. Ray Serve would
    listen on all of the machine's. To be called while a deployment is made: it listens afterwards."""
    address = ray.util.get_node_ip_address()
    add_port = ray_replica.add_port_to_grpc_server

    def add(server: Any, place: str) -> int:
        host = f"[{address}]" if ":" in address else address
        return add_port(server, place.replace("[::]", host))

    ray_replica.add_port_to_grpc_server = add
