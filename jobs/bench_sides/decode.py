"""Our engine decoding SEQUENCES prompts of NEW_TOKENS each, with or without adapters."""

import json
from pathlib import Path

from shared import BASE, SEQUENCES, decoding_rate, peak_gib

from ftray.config.serve import AdaptersConfig, EngineConfig
from ftray.infer.engines import load_adapter
from ftray.infer.protocol import Request, Sampling
from ftray.infer.torch_engine import TorchEngine
from ftray.model.hardware import choose_hardware


def decode(adapters: list[Path]) -> None:
    config = EngineConfig(max_sequences=SEQUENCES, context_tokens=1024, kv_cache_tokens=16384)
    engine = TorchEngine(BASE, choose_hardware(), config, AdaptersConfig())
    keys = [str(path) for path in adapters]
    for key in keys:
        load_adapter(engine, key, Path(key))

    def run(prompts: list[list[int]], new_tokens: int) -> None:
        sampling = Sampling(temperature=0, max_tokens=new_tokens, ignore_eos=True)
        for i, prompt in enumerate(prompts):
            engine.add(Request(str(i), prompt, sampling, keys[i % len(keys)] if keys else None))
        while engine.has_work:
            engine.step()

    print(json.dumps({"tokens_per_s": decoding_rate(run, engine.tokenizer), "peak_gib": peak_gib()}))
