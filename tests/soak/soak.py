"""Ten minutes of everything at once: `make soak`. Clients at full rate against two replicas, adapters swapped under
them, aliases flipped, a replica killed every half minute, a tenant over its quota, clients that vanish.

At the end: no whole answer was lost, none came from another version than the one it names, the ledger has every answer
with the tokens that its client counted, and memory is flat. The result is a JSON file; the exit code says whether it
holds. Random weights: what is tried here is everything but the model.
"""

import argparse
import asyncio
import itertools
import json
import math
import os
import random
import sqlite3
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny import write_peft_adapter, write_tiny_model

NUM_WEIGHTS, NUM_NAMES, CLIENTS = 4, 12, 24
KILL_EVERY_S, FLIP_EVERY_S, MEASURE_EVERY_S = 30.0, 0.5, 5.0
PUBLISH_EVERY = 40  # flips: three versions a minute
VANISH, STREAM = 0.05, 0.6  # shares of requests
QUOTA = 30  # requests a minute of the tenant that asks for more
QUESTION, TOKENS = "where is the refund", 12
SETTLING_S = 300
FLAT_MIB_PER_MINUTE = 1.0
PART_OF_IT = ("ingress", "ledger", "engine", "ProxyActor", "ServeController")


@dataclass
class Soak:
    url: str
    keys: dict[str, str]
    expected: list[str] = field(default_factory=list)  # the answer of each of the weights
    counts: Counter[str] = field(default_factory=Counter)
    whole: dict[str, tuple[str, str, int, int]] = field(default_factory=dict)  # by request id: what the client counted
    wrong: list[str] = field(default_factory=list)
    latency_s: list[tuple[float, float]] = field(default_factory=list)  # whole answers; and since the last kill
    killed_at: float = -math.inf
    memory: dict[str, list[tuple[float, int]]] = field(default_factory=dict)

    async def client(self, http: httpx.AsyncClient, number: int, until: float) -> None:
        chance = random.Random(number)
        tenants = [name for name in self.keys if name != "boss"]
        while time.monotonic() < until:
            tenant = tenants[number % len(tenants)]
            name = f"a{chance.randrange(NUM_NAMES)}"
            model = name if chance.random() < 0.7 else f"{name}@{1 + chance.randrange(NUM_WEIGHTS)}"
            body = body_of(model)
            began, whole = time.monotonic(), False
            try:
                if chance.random() < STREAM:
                    whole = await self.streamed(http, tenant, body, vanish=chance.random() < VANISH)
                else:
                    whole = await self.asked(http, tenant, body)
            except httpx.HTTPError as error:
                self.wrong.append(f"{model}: {type(error).__name__} {error}")
            if whole:
                self.latency_s.append((time.monotonic() - began, began - self.killed_at))

    async def asked(self, http: httpx.AsyncClient, tenant: str, body: dict) -> bool:
        response = await http.post("/v1/chat/completions", json=body, headers=self.headers(tenant))
        if await self.is_refused(response, tenant, body["model"]):
            return False
        answer = response.json()
        self.note(tenant, answer, answer["choices"][0]["message"]["content"], answer["usage"])
        return True

    async def streamed(self, http: httpx.AsyncClient, tenant: str, body: dict, *, vanish: bool) -> bool:
        body = body | {"stream": True, "stream_options": {"include_usage": True}}
        text, usage, event, num_seen = "", None, {}, 0
        async with http.stream("POST", "/v1/chat/completions", json=body, headers=self.headers(tenant)) as response:
            if await self.is_refused(response, tenant, body["model"]):
                return False
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    self.counts["streams cut by a killed replica, told so"] += 1
                    if "died" not in event["error"]["message"]:
                        self.wrong.append(f"{body['model']}: {event['error']['message']}")
                    return False
                usage = event["usage"] or usage
                text += event["choices"][0]["delta"].get("content") or "" if event["choices"] else ""
                num_seen += 1
                if vanish and num_seen == 4:
                    self.counts["clients that vanished"] += 1
                    return False
        if usage is None:
            self.wrong.append(f"{body['model']}: a stream ended without its end")
            return False
        self.note(tenant, event, text, usage)
        return True

    async def is_refused(self, response: httpx.Response, tenant: str, model: str) -> bool:
        """Only the tenant over its quota may be; it waits as it is told to, at most two seconds."""
        if response.status_code == 429 and tenant == "greedy":
            self.counts["refused for the quota"] += 1
            await asyncio.sleep(min(float(response.headers["retry-after"]), 2.0))
        elif response.status_code != 200:
            await response.aread()
            self.wrong.append(f"{model}: status {response.status_code}: {response.text[:200]}")
        return response.status_code != 200

    def note(self, tenant: str, answer: dict, text: str, usage: dict) -> None:
        number = int(answer["model"].rpartition("@")[2])
        if text != self.expected[(number - 1) % NUM_WEIGHTS]:
            self.wrong.append(f"{answer['model']}: the answer is another version's")
        request_id = answer["id"].removeprefix("chatcmpl-")
        self.whole[request_id] = (tenant, answer["model"], usage["prompt_tokens"], usage["completion_tokens"])

    def headers(self, tenant: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.keys[tenant]}"}

    async def flip(self, registry, adapters: list[Path], until: float) -> None:
        from ftray.artifacts.publish import publish_adapter

        chance, number = random.Random(0), 0
        while time.monotonic() < until:
            await asyncio.sleep(FLIP_EVERY_S)
            name = f"a{chance.randrange(NUM_NAMES)}"
            if number % PUBLISH_EVERY == 0:  # a version more, with the weights that its number stands for
                latest = registry.versions(name)[-1]
                await asyncio.to_thread(publish_adapter, registry, name, adapters[latest % NUM_WEIGHTS])
                self.counts["published"] += 1
            target = chance.choice(registry.versions(name))
            await asyncio.to_thread(registry.promote, f"{name}@{target}", "prod")
            self.counts["flips"] += 1
            number += 1

    async def kill(self, until: float) -> None:
        while time.monotonic() + KILL_EVERY_S < until:
            await asyncio.sleep(KILL_EVERY_S)
            replicas = [process for what, process in parts() if what == "engine"]
            if len(replicas) > 1:  # the younger one: the other's memory is followed over the whole time
                max(replicas, key=lambda process: process.create_time()).kill()
                self.killed_at = time.monotonic()
                self.counts["replicas killed"] += 1

    async def measure(self, began: float, until: float) -> None:
        while time.monotonic() < until:
            await asyncio.sleep(MEASURE_EVERY_S)
            for what, process in parts():
                try:
                    used = process.memory_info().rss
                except psutil.Error:
                    continue
                self.memory.setdefault(f"{what} {process.pid}", []).append((time.monotonic() - began, used))

    def curves(self) -> dict[str, list[int]]:
        """MiB of each process that lived for more than two minutes, every half minute."""
        every = round(30 / MEASURE_EVERY_S)
        long = {name: samples for name, samples in self.memory.items() if len(samples) > 120 / MEASURE_EVERY_S}
        return {name: [round(used / 2**20) for _, used in samples[::every]] for name, samples in long.items()}

    def growth(self) -> dict[str, float]:
        """MiB a minute of each process that lived long, after its first minutes: until then caches fill. The median
        of the slopes between all pairs of samples (Theil and Sen): what is free within the allocator comes and goes,
        and one low sample at the start would make a line of least squares rise."""
        found = {}
        for name, samples in self.memory.items():
            late = [(at / 60, used / 2**20) for at, used in samples if at > samples[0][0] + SETTLING_S]
            slopes = [(b - a) / (until - at) for (at, a), (until, b) in itertools.combinations(late, 2)]
            if len(late) * MEASURE_EVERY_S > SETTLING_S / 2:
                found[name] = round(statistics.median(slopes), 2)
        return found


def body_of(model: str) -> dict:
    messages = [{"role": "user", "content": QUESTION}]
    return {"model": model, "messages": messages, "temperature": 0, "max_tokens": TOKENS, "ignore_eos": True}


def parts() -> list[tuple[str, psutil.Process]]:
    """The endpoint's processes, of this program's Ray session."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            title = " ".join(process.cmdline())
        except psutil.Error:
            continue
        what = next((part for part in PART_OF_IT if part in title and "ray::" in title), None)
        if what is not None:
            found.append((what, process))
    return found


def ledger_rows(database: Path) -> dict[str, tuple]:
    columns = "request_id, tenant, model, prompt_tokens, completion_tokens, outcome"
    with sqlite3.connect(database) as connection:
        rows = connection.execute(f"SELECT {columns} FROM usage")
        return {row[0].rpartition(".")[0]: row[1:] for row in rows}


def compare(soak: Soak, rows: dict[str, tuple]) -> dict[str, int]:
    missing = [request_id for request_id in soak.whole if request_id not in rows]
    other = [i for i, counted in soak.whole.items() if i in rows and rows[i] != (*counted, "whole")]
    extra = [row for i, row in rows.items() if i not in soak.whole and row[-1] == "whole"]
    soak.wrong += [f"{len(missing)} whole answers are not in the ledger"] if missing else []
    soak.wrong += [f"{len(other)} answers are in the ledger with other figures"] if other else []
    # A client may vanish when the last token is written already.
    if len(extra) > soak.counts["clients that vanished"]:
        soak.wrong.append(f"{len(extra)} answers are in the ledger that no client had")
    return {"rows": len(rows), "cut": sum(row[-1] == "cut" for row in rows.values()), "whole, client gone": len(extra)}


async def run(soak: Soak, registry, adapters: list[Path], minutes: float) -> float:
    limits = httpx.Limits(max_connections=CLIENTS, max_keepalive_connections=CLIENTS)
    async with httpx.AsyncClient(base_url=soak.url, timeout=120, limits=limits) as http:
        for number in range(1, NUM_WEIGHTS + 1):
            body = body_of(f"a0@{number}")
            response = await http.post("/v1/chat/completions", json=body, headers=soak.headers("boss"))
            soak.expected.append(response.raise_for_status().json()["choices"][0]["message"]["content"])
            answer = response.json()
            soak.note("boss", answer, soak.expected[-1], answer["usage"])
        assert len(set(soak.expected)) == NUM_WEIGHTS
        began = time.monotonic()
        until = began + minutes * 60
        clients = [soak.client(http, number, until) for number in range(CLIENTS)]
        await asyncio.gather(
            *clients, soak.flip(registry, adapters, until), soak.kill(until), soak.measure(began, until)
        )
        await asyncio.sleep(3)  # what clients left behind is settled
        return time.monotonic() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks/soak.json"))
    asked = parser.parse_args()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    from ftray.artifacts.publish import publish_adapter
    from ftray.config import parse_config
    from ftray.registry import Registry
    from ftray.serve.app import start_endpoint, stop_endpoint
    from ftray.serve.tenants.accounts import Accounts, Tenant

    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        base = write_tiny_model(root / "base")
        adapters = [write_peft_adapter(root / f"w{i}", base, rank=4 * (i + 1), seed=i) for i in range(NUM_WEIGHTS)]
        registry = Registry(str(root / "registry"))
        for name in (f"a{number}" for number in range(NUM_NAMES)):
            for adapter in adapters:
                publish_adapter(registry, name, adapter)
            registry.promote(f"{name}@1", "prod")
        accounts = Accounts(str(root / "tenants.db"))
        tenants = [Tenant("acme"), Tenant("bolt", priority=2.0), Tenant("greedy", requests_per_minute=QUOTA)]
        keys = {tenant.name: accounts.create(tenant) for tenant in [*tenants, Tenant("boss", is_admin=True)]}
        config = parse_config(
            f"kind: serve\nbase_model: {base}\nserved_name: tiny\nport: 8765\n"
            "engine: {max_sequences: 16, context_tokens: 128, kv_cache_tokens: 4096}\n"
            # Room for about ten of the 48 versions and more: they are swapped all the time.
            f"adapters: {{registry: {registry.location}, host_budget: 800KiB, device_budget: 400KiB}}\n"
            f"replicas: {{min: 2, max: 2}}\ntenants: {{database: {accounts.database.location}}}\n",
            kind="serve",
            source="soak",
        )
        ray.init(address="local", num_cpus=4, log_to_driver=False)
        soak = Soak(start_endpoint(config), keys)
        try:
            seconds = asyncio.run(run(soak, registry, adapters, asked.minutes))
            ledger = compare(soak, ledger_rows(root / "tenants.db"))
        finally:
            stop_endpoint()
            ray.shutdown()
    growth = soak.growth()
    grown = [name for name, slope in growth.items() if slope > FLAT_MIB_PER_MINUTE]
    soak.wrong += [f"memory grows: {name}" for name in grown]
    tokens = sum(counted[3] for counted in soak.whole.values())
    result = {
        "minutes": round(seconds / 60, 2),
        "clients": CLIENTS,
        "whole answers": len(soak.whole),
        "answers/s": round(len(soak.whole) / seconds, 1),
        "completion tokens/s": round(tokens / seconds, 1),
        "latency s (p50, p99, max)": np.quantile([s for s, _ in soak.latency_s], (0.5, 0.99, 1.0)).round(3).tolist(),
        "slowest: s, asked so many s after the last kill": [
            [round(value, 1) for value in pair] for pair in sorted(soak.latency_s, reverse=True)[:5]
        ],
        **soak.counts,
        "ledger": ledger,
        "memory growth, MiB/minute after five minutes": growth,
        "memory, MiB every half minute": soak.curves(),
        "wrong": soak.wrong[:50],
        "num wrong": len(soak.wrong),
    }
    asked.output.parent.mkdir(parents=True, exist_ok=True)
    asked.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 1 if soak.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
