"""Does this engine compute an architecture right? Its twin (model/proof.py) answers in chunks, beside others, out of
pages that sequences share, and must give transformers' own log-probabilities."""

import contextlib
import tempfile
from pathlib import Path
from typing import Any

import torch

from ftray.config.serve import AdaptersConfig, EngineConfig
from ftray.infer.protocol import Request, SamplingParams
from ftray.infer.torch_engine.engine import TorchEngine
from ftray.model.base import BaseModel
from ftray.model.hardware import choose_hardware
from ftray.model.proof import difference, first_line, log_probs, save_twin, sequences, twin_of

ANSWER_TOKENS = 6
# So few prompt tokens a step that the longest prompt comes in pieces, beside answers that go on.
SMALL = EngineConfig(max_sequences=4, context_tokens=64, kv_cache_tokens=256, max_prefill_tokens=10)


def served_problem(base: BaseModel, **_: Any) -> str | None:
    """What is wrong with it; None: nothing."""
    try:
        model = twin_of(base)
        log_probs(model, sequences()[0])
    except Exception as error:  # noqa: BLE001  an architecture is code of others, made smaller than it was meant
        return f"no small twin of it can be made ({first_line(error)})"
    with tempfile.TemporaryDirectory(prefix="ftray-twin-") as scratch:
        twin = save_twin(base, model, Path(scratch))
        try:
            whole, found = answers(twin)
        except Exception as error:  # noqa: BLE001
            return f"its layers do not go through the engine ({first_line(error)})"
    return difference(found, [log_probs(model, ids) for ids in whole], what="answers differ from transformers' own")


def answers(twin: BaseModel) -> tuple[list[list[int]], list[torch.Tensor]]:
    """(prompt and answer, their log-probabilities) of each sequence; the last prompt begins as the first does."""
    first, *others = sequences()
    prompts = {str(number): ids for number, ids in enumerate([first, *others, [*first[:18], 7, 9]])}
    sampling = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS, ignore_eos=True, logprobs=0, prompt_logprobs=0)
    tokens = {name: list(ids) for name, ids in prompts.items()}
    found: dict[str, list[float]] = {name: [] for name in prompts}
    with contextlib.closing(TorchEngine(twin, choose_hardware(use_gpu=False), SMALL, AdaptersConfig())) as engine:
        for name, ids in prompts.items():
            engine.add(Request(name, ids, sampling))
            take(engine.step(), tokens, found)  # each begins while those before go on
        while engine.has_work:
            take(engine.step(), tokens, found)
    return list(tokens.values()), [torch.tensor(values) for values in found.values()]


def take(events: list[Any], tokens: dict[str, list[int]], found: dict[str, list[float]]) -> None:
    for event in events:
        for entry in event.prompt_logprobs or ():
            found[event.request_id].append(entry.chosen)
        tokens[event.request_id].append(event.token_id)
        found[event.request_id].append(event.logprobs.chosen)
