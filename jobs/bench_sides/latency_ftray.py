"""How long a request waits, through a whole replica: at several rates, with more adapters than the device holds, and
with more of them asked for at the same time than it holds.

Requests come at random times (Poisson) and ask for adapters by Zipf's law. The device has room for so many adapters,
memory for HOST. A cold adapter is in the registry only, a warm one on the device. A gap is the time between two tokens
of an answer, while others begin, are computed and load.
"""

import asyncio
import itertools
import json
import random
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared import BASE, decoding_prompts, peak_gib, write_adapters

from ftray.config import ServeConfig
from ftray.infer.protocol import SamplingParams
from ftray.registry import Registry
from ftray.serve.protocol import Failed, Tokens
from ftray.serve.replica.replica import EngineReplica, GenerateJob

HOST = 64
ANSWER_TOKENS = 32
SECONDS = 30
TRAFFIC = {  # (registered adapters, slots): requests a second
    (16, 16): (2,),
    (64, 16): (1, 2, 3),
    (64, 4): (2, 3),
    (256, 16): (2,),
    (1000, 16): (2,),
}


@dataclass
class Timing:
    first_s: float
    gaps_s: list[float]
    where: str  # the adapter was: device, host, registry


def make_replica(directory: Path, num_adapters: int, num_slots: int) -> EngineReplica:
    made = write_adapters(directory / "made", count=8, rank=8, targets=["q_proj", "v_proj"])
    registry = Registry(str(directory / "registry"))
    for i in range(num_adapters):
        registry.publish(f"a{i}", made[i % len(made)], metadata={"base_fingerprint": BASE.fingerprint})
    config = ServeConfig.model_validate(
        {
            "kind": "serve",
            "base_model": "smollm2-135m",
            "engine": {"max_sequences": 16, "context_tokens": 512, "kv_cache_tokens": 16384},
            "adapters": {"registry": str(directory / "registry")},
            "replicas": {"cpus_each": 2},
        }
    )
    replica = EngineReplica(config)
    size = replica.engine.prepare_adapter("size", made[0]).num_bytes
    replica.engine._bank.slots.budget_bytes = num_slots * size  # pyright: ignore[reportAttributeAccessIssue]
    replica.residency.budget_bytes = HOST * size
    return replica


def where_is(replica: EngineReplica, key: str) -> str:
    if key in replica.engine.stats().adapters_on_device:
        return "device"
    return "host" if key in replica.residency.resident_keys else "registry"


async def ask(replica: EngineReplica, key: str, prompt: list[int]) -> Timing:
    where = where_is(replica, key)
    sampling = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS, ignore_eos=True)
    began = time.perf_counter()
    times = []
    async for event in replica.generate(GenerateJob([prompt], False, sampling, key)):
        assert not isinstance(event, Failed), event
        if isinstance(event, Tokens):
            times.append(time.perf_counter())
    return Timing(times[0] - began, [later - earlier for earlier, later in itertools.pairwise(times)], where)


async def traffic(replica: EngineReplica, prompts: list[list[int]], *, num_adapters: int, rate: float) -> list[Timing]:
    chance = random.Random(num_adapters + int(rate))
    weights = [1 / (rank + 1) for rank in range(num_adapters)]
    tasks = []
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        key = f"a{chance.choices(range(num_adapters), weights)[0]}@1"
        # a first token of its own, so that no cache of prompts helps
        prompt = [chance.randrange(1000, 40_000), *chance.choice(prompts)]
        tasks.append(asyncio.create_task(ask(replica, key, prompt)))
        await asyncio.sleep(chance.expovariate(rate))
    return await asyncio.gather(*tasks)


def quantile(values: list[float], share: float) -> float | None:
    """In milliseconds."""
    return round(sorted(values)[min(len(values) - 1, int(share * len(values)))] * 1000, 1) if values else None


def summary(name: str, timings: list[Timing]) -> dict[str, Any]:
    first, per_token = [t.first_s for t in timings], [statistics.mean(t.gaps_s) for t in timings]
    gaps = [gap for t in timings for gap in t.gaps_s]
    warm = [t.first_s for t in timings if t.where == "device"]
    cold = [t.first_s for t in timings if t.where == "registry"]
    return {
        f"{name}_requests": len(timings),
        f"{name}_first_token_p50_ms": quantile(first, 0.5),
        f"{name}_first_token_p99_ms": quantile(first, 0.99),
        f"{name}_per_token_p50_ms": quantile(per_token, 0.5),
        f"{name}_per_token_p99_ms": quantile(per_token, 0.99),
        f"{name}_gap_p99_ms": quantile(gaps, 0.99),
        f"{name}_gap_most_ms": quantile(gaps, 1),
        f"{name}_warm_p50_ms": quantile(warm, 0.5),
        f"{name}_cold_p50_ms": quantile(cold, 0.5),
        f"{name}_cold_requests": len(cold),
    }


async def measure() -> dict[str, Any]:
    result: dict[str, Any] = {}
    began, num_tokens = time.perf_counter(), 0
    for (num_adapters, num_slots), rates in TRAFFIC.items():
        with tempfile.TemporaryDirectory(prefix="ftray-bench-") as directory:
            replica = make_replica(Path(directory), num_adapters, num_slots)
            prompts = decoding_prompts(replica.engine.tokenizer)
            await ask(replica, "a0@1", prompts[0])
            for rate in rates:
                timings = await traffic(replica, prompts, num_adapters=num_adapters, rate=rate)
                num_tokens += len(timings) * ANSWER_TOKENS
                result |= summary(f"adapters_{num_adapters}_slots_{num_slots}_rate_{rate}", timings)
            replica.runner.close()
    return {"tokens_per_s": round(num_tokens / (time.perf_counter() - began), 1), **result, "peak_gib": peak_gib()}


print(json.dumps(asyncio.run(measure())))
