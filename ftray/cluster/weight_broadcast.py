"""A base model in an object store, brought to all nodes: the store is read once, whatever their number.

Ray's object store passes it on: a part that was read is an object, and a node that wants it takes it from any node that
has it by then, so the parts spread as a tree. A node that comes later, or where this fails, fetches by itself.
"""

import contextlib
import os
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError

from ftray.cluster.resources import pinned_to
from ftray.cluster.worker_env import passed_environment, passed_secrets
from ftray.errors import FtrayError
from ftray.model.base import is_model_file
from ftray.storage import local_copies
from ftray.storage.cache import cache_directory
from ftray.storage.local_copies import Filling, look
from ftray.storage.manifest import MANIFEST

PART_BYTES = 256 << 20
PARTS_ON_THE_WAY = 4  # in each node's object store


class Holder:
    """An actor of Ray's on each node, with its copy."""

    def __init__(self, url: str, secrets: dict[str, str]):
        os.environ.update(secrets)
        self._store, objects = look(url, is_model_file)
        copies = local_copies(cache_directory())
        self._directory = copies.directory_of(url, objects)
        self._claim = copies.claim(url, objects, is_model_file, wait=False)
        self._held = contextlib.ExitStack()  # the claim, from `begin` to `finish`
        self._filling: Filling | None = None

    def has(self) -> bool:
        return (self._directory / MANIFEST).is_file()

    def begin(self) -> bool:
        """Whether it wants the parts: its machine may have them by now, or another process that fetches them."""
        self._filling = self._held.enter_context(self._claim)
        return self._filling is not None

    def read(self, key: str, start: int, length: int) -> bytes:
        if not self.has():
            return self._store.read_part(key, start, length)
        with (self._directory / key).open("rb") as file:
            file.seek(start)
            return file.read(length)

    def write(self, key: str, start: int, part: bytes) -> None:
        assert self._filling is not None
        self._filling.write(key, start, part)

    def finish(self) -> None:
        assert self._filling is not None
        self._filling.finish()
        self._held.close()


def broadcast_base(url: str, nodes: list[dict[str, Any]], *, log: Callable[[str], None]) -> None:
    """To the `nodes` that have no copy; a base that lies in no store needs none. What goes wrong is told, and left to
    each node."""
    if "://" not in url:
        return
    here = ray.get_runtime_context().get_node_id()
    ids = [here, *(node["NodeID"] for node in nodes if node["NodeID"] != here)]
    if len(ids) == 1:
        return
    actor = ray.remote(num_cpus=0, runtime_env={"env_vars": passed_environment()})(Holder)
    holders: list[Any] = [
        actor.options(scheduling_strategy=pinned_to(node)).remote(url, passed_secrets()) for node in ids
    ]
    try:
        there = ray.get([holder.has.remote() for holder in holders])
        missing = [holder for holder, has in zip(holders, there, strict=True) if not has]
        reader = next((holder for holder, has in zip(holders, there, strict=True) if has), holders[0])
        wants = ray.get([holder.begin.remote() for holder in missing])
        missing = [holder for holder, wanted in zip(missing, wants, strict=True) if wanted]
        if missing:
            log(f"{url} goes to {len(missing)} node{'s' if len(missing) > 1 else ''}, from node to node")
            pass_on(url, reader, missing)
    except (RayError, FtrayError) as error:
        log(f"{url} was not passed on ({str(error).strip().splitlines()[-1]}); each node fetches it")
    finally:
        for holder in holders:
            with contextlib.suppress(RayError):
                ray.kill(holder)


def pass_on(url: str, reader: Any, missing: list[Any]) -> None:
    _, objects = look(url, is_model_file)
    on_the_way: list[list[Any]] = []
    for found in objects:
        for start in range(0, max(found.size, 1), PART_BYTES):  # an empty file is a part too
            part = reader.read.remote(found.key, start, min(PART_BYTES, found.size - start))
            on_the_way.append([holder.write.remote(found.key, start, part) for holder in missing])
            if len(on_the_way) > PARTS_ON_THE_WAY:
                ray.get(on_the_way.pop(0))
    for parts in on_the_way:
        ray.get(parts)
    ray.get([holder.finish.remote() for holder in missing])
