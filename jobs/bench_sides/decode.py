"""Our engine decoding SEQUENCES prompts of NEW_TOKENS each, with or without adapters."""

from pathlib import Path

from shared import BASE, SEQUENCES, decode_in_rounds

from ftray.config.serve import AdaptersConfig, EngineConfig
from ftray.infer.engines import load_adapter
from ftray.infer.protocol import Request, SamplingParams
from ftray.infer.torch_engine.engine import TorchEngine
from ftray.model.hardware import choose_hardware


class Decoder:
    def __init__(self, adapters: list[Path]):
        config = EngineConfig(max_sequences=SEQUENCES, context_tokens=1024, kv_cache_tokens=16384)
        self._engine = TorchEngine(BASE, choose_hardware(), config, AdaptersConfig())
        self._keys = [str(path) for path in adapters]
        for key in self._keys:
            load_adapter(self._engine, key, Path(key))
        self.tokenizer = self._engine.tokenizer

    def run(self, prompts: list[list[int]], new_tokens: int) -> None:
        sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
        for i, prompt in enumerate(prompts):
            adapter = self._keys[i % len(self._keys)] if self._keys else None
            self._engine.add(Request(str(i), prompt, sampling, adapter))
        while self._engine.has_work:
            self._engine.step()


def decode(adapters: list[Path]) -> None:
    decoder = Decoder(adapters)
    decode_in_rounds(decoder.run, decoder.tokenizer)
