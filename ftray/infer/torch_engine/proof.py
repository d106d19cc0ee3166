"""Does this engine compute an architecture right? Its twin (model/proof.py) answers in chunks, beside others, with and
without an adapter, out of pages that sequences share and lose, and must give transformers' own log-probabilities."""

import contextlib
import copy
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ftray.config.adapter import AdapterConfig
from ftray.config.serve import AdaptersConfig, EngineConfig
from ftray.infer.protocol import Request, SamplingParams
from ftray.infer.torch_engine.cpu.frozen_linear import weight_of
from ftray.infer.torch_engine.engine import TorchEngine
from ftray.model.adapters.linear import linear_modules
from ftray.model.adapters.lora import write_adapter
from ftray.model.base import BaseModel
from ftray.model.families.rotary import short_context
from ftray.model.hardware import choose_hardware
from ftray.model.proof import difference, first_line, log_probs, sequences
from ftray.model.twin import SPREAD, save_twin, twin_of

ANSWER_TOKENS = 10  # past the end of a page
ADAPTER, RANK = "adapter", 2
# So few prompt tokens a step that the longest prompt comes in pieces, beside answers that go on; so few pages that some
# sequences lose theirs.
SMALL = EngineConfig(max_sequences=4, context_tokens=64, kv_cache_tokens=80, max_prefill_tokens=10)


@dataclass
class Answer:
    prompt: list[int]
    adapter: str | None
    tells_prompt: bool  # its log-probabilities; what does not may take pages of others
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)

    def expected(self, model: Any) -> torch.Tensor:
        """As many, by transformers."""
        whole = [*self.prompt, *self.tokens]
        if short_context(model.config) is None:
            found = log_probs(model, whole)
        else:  # each token is drawn by the rotation of the sequence as it was then
            ends = range(len(self.prompt), len(whole))
            drawn = [model(torch.tensor([whole[:end]])).logits[0, -1].log_softmax(-1)[whole[end]] for end in ends]
            found = torch.cat([log_probs(model, self.prompt), torch.stack(drawn)])
        return found if self.tells_prompt else found[-len(self.tokens) :]


def served_problem(base: BaseModel, **_: Any) -> str | None:
    """What is wrong with it; None: nothing."""
    try:
        model = twin_of(base)
        log_probs(model, sequences()[0])
    except Exception as error:  # noqa: BLE001  an architecture is code of others, made smaller than it was meant
        return f"no small twin of it can be made ({first_line(error)})"
    with tempfile.TemporaryDirectory(prefix="ftray-twin-") as scratch, torch.no_grad():
        twin = save_twin(base, model, Path(scratch) / "base")
        adapted = with_adapter(model, twin, Path(scratch) / ADAPTER)
        try:
            found = answers(twin, Path(scratch) / ADAPTER)
        except Exception as error:  # noqa: BLE001
            return f"its layers do not go through the engine ({first_line(error)})"
        expected = [answer.expected(model if answer.adapter is None else adapted) for answer in found]
    given = [torch.tensor(answer.log_probs) for answer in found]
    return difference(given, expected, what="answers differ from transformers' own")


def with_adapter(model: Any, base: BaseModel, directory: Path) -> Any:
    """Writes LoRA on all linear layers; returns the model with it added to the weights."""
    adapted, noise = copy.deepcopy(model), torch.Generator().manual_seed(3)
    layers: dict[str, Any] = linear_modules(adapted)
    weights: dict[str, torch.Tensor] = {}
    for name, layer in layers.items():
        weight = weight_of(layer)
        a = torch.randn(RANK, weight.shape[1], generator=noise) * SPREAD
        b = torch.randn(weight.shape[0], RANK, generator=noise) * SPREAD
        weight.add_(b @ a)
        weights |= {f"{name}.lora_A.default.weight": a, f"{name}.lora_B.default.weight": b}
    write_adapter(directory, weights, AdapterConfig(rank=RANK, alpha=RANK), base, metadata={})
    return adapted


def answers(twin: BaseModel, adapter: Path) -> list[Answer]:
    """With their log-probabilities; two prompts begin as the first does."""
    first, *others = sequences()
    wanted = [
        *(Answer(ids, None, tells_prompt=True) for ids in (first, *others)),
        *(Answer(ids, ADAPTER, tells_prompt=True) for ids in (first, others[0])),
        *(Answer([*first[:18], 7, 9], name, tells_prompt=False) for name in (None, ADAPTER)),
    ]
    found = {str(number): answer for number, answer in enumerate(wanted)}
    with contextlib.closing(TorchEngine(twin, choose_hardware(use_gpu=False), SMALL, AdaptersConfig())) as engine:
        engine.load_adapter(engine.prepare_adapter(ADAPTER, adapter))
        for name, answer in found.items():
            tells = 0 if answer.tells_prompt else None
            settings = {"temperature": 0, "max_tokens": ANSWER_TOKENS, "ignore_eos": True}
            sampling = SamplingParams(**settings, logprobs=0, prompt_logprobs=tells)
            engine.add(Request(name, answer.prompt, sampling, answer.adapter))
            take(engine.step(), found)  # each begins while those before go on
        while engine.has_work:
            take(engine.step(), found)
    return wanted


def take(events: list[Any], found: dict[str, Answer]) -> None:
    for event in events:
        answer = found[event.request_id]
        answer.log_probs += [entry.chosen for entry in event.prompt_logprobs or ()]
        answer.tokens.append(event.token_id)
        answer.log_probs.append(event.logprobs.chosen)
