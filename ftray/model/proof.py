"""A base is used where its computation is shown right, not where nothing is known against it.

A twin of it is made at its first use: its own config with few layers that keep each kind, small widths and windows,
and random weights. Over packed rows the twin must give what transformers' own forward gives sequence by sequence. It
takes a second, reads no weights, and is remembered by the architecture and the versions of torch and transformers.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ftray.errors import UserError
from ftray.model.base import BaseModel
from ftray.model.families import check_layers
from ftray.model.twin import NOT_OF_THE_TWIN, SMALL, SPREAD, twin_of
from ftray.model.weight_precision import check_precision
from ftray.storage import read_json, write_json
from ftray.storage.cache import cache_directory

PROOFS = "proofs"  # in the cache
VERSION = 3  # of what is compared: another number compares anew
# In float32 right ones differ by some 1e-6, wrong ones by 2e-3 and more.
TOLERANCE = 2e-4
LENGTHS = (24, 9, 5)  # of sequences: on both sides of a window of 8


def check_packed(base: BaseModel) -> None:
    """Raises `UserError` where a packed row of its architecture is not shown right."""
    check_layers(base)
    check_precision(base)
    refuse(base, remembered("packed", base, lambda: packed_problem(base)), what="training")


class NotShownRightError(UserError):
    problem: str  # what differs, alone


def refuse(base: BaseModel, problem: str | None, *, what: str) -> None:
    if problem is not None:
        kind = read_json(base.directory / "config.json").get("model_type")
        error = NotShownRightError(
            f"base_model: {base.name}: {what} of its architecture ({kind}) is not shown right: {problem}; ftray does "
            "not compute it yet: choose another base"
        )
        error.problem = problem
        raise error


def remembered(kind: str, base: BaseModel, find: Callable[[], str | None]) -> str | None:
    """What is wrong with it; None: nothing, which is looked for no more."""
    if is_remembered(kind, base):
        return None
    with quiet():
        problem = find()
    path = proof_file(kind, base)
    if problem is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"base_model": base.name})
    return problem


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What transformers says of slow ways to compute does not matter for a twin."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def is_remembered(kind: str, base: BaseModel) -> bool:
    """As right."""
    return proof_file(kind, base).is_file()


def proof_file(kind: str, base: BaseModel) -> Path:
    return cache_directory() / PROOFS / f"{kind}-{key_of(base)}.json"


def key_of(base: BaseModel) -> str:
    config = read_json(base.directory / "config.json")
    for name in (*NOT_OF_THE_TWIN, "_name_or_path"):
        config.pop(name, None)
    versions = [VERSION, version("torch"), version("transformers"), version("ftray")]
    return hashlib.sha256(json.dumps([config, versions], sort_keys=True).encode()).hexdigest()[:24]


def packed_problem(base: BaseModel) -> str | None:
    try:
        model = twin_of(base)
        alone = [log_probs(model, ids) for ids in sequences()]
    except Exception as error:  # noqa: BLE001  an architecture is code of others, made smaller than it was meant
        return f"no small twin of it can be made ({first_line(error)})"
    try:
        packed = packed_log_probs(model, sequences())
    except Exception as error:  # noqa: BLE001
        return f"packed rows do not go through it ({first_line(error)})"
    problem = difference(packed, alone, what="packed rows differ from transformers' own forward")
    return problem or adapter_problem(base)


def adapter_problem(base: BaseModel, *, experts: bool = False) -> str | None:
    """Of LoRA on all linear layers, and on experts, by PEFT: packed rows against sequences alone, and their
    gradients."""
    from ftray.config.adapter import AdapterConfig
    from ftray.model.adapters.lora import inject_lora

    try:
        model = twin_of(base)
        inject_lora(model, AdapterConfig(rank=2, alpha=2, experts=experts), seed=0)
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        disturb(trained)
        alone = [log_probs(model, ids) for ids in sequences()]
        expected = gradients(alone, trained)
        packed = packed_log_probs(model, sequences())
        found = gradients(packed, trained)
    except Exception as error:  # noqa: BLE001
        return f"LoRA on all its linear layers does not go through it ({first_line(error)})"
    problem = difference(packed, alone, what="packed rows with LoRA differ from PEFT's layers")
    scale = max(gradient.abs().max() for gradient in expected)
    return problem or difference(
        [gradient / scale for gradient in found],
        [gradient / scale for gradient in expected],
        what="gradients of LoRA differ from PEFT's layers",
        unit="of the largest",
    )


def disturb(parameters: Mapping[str, Any]) -> None:
    """From the start of LoRA, whose B is zero."""
    import torch

    noise = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.copy_(torch.randn(parameter.shape, generator=noise) * SPREAD)


def gradients(log_probs: Sequence[Any], parameters: Mapping[str, Any]) -> list[Any]:
    """Of the sum of all log-probabilities."""
    import torch

    found = torch.autograd.grad(torch.cat(list(log_probs)).sum(), list(parameters.values()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters.values(), strict=True)]


def difference(
    found: Sequence[Any], expected: Sequence[Any], *, what: str, unit: str = "(log-probability of a token)"
) -> str | None:
    """`found`, `expected`: log-probabilities [N] of each sequence, or what else is measured in `unit`."""
    import torch

    largest = largest_difference(found, expected)
    finite = all(torch.isfinite(values).all() for values in expected)
    return None if finite and largest <= TOLERANCE else f"{what} by {largest:.1g} {unit}"


def largest_difference(found: Sequence[Any], expected: Sequence[Any]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))


def first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:120]}" if text else type(error).__name__


def sequences() -> list[list[int]]:
    import torch

    chance = torch.Generator().manual_seed(1)
    return [torch.randint(1, SMALL["vocab_size"], (length,), generator=chance).tolist() for length in LENGTHS]


def log_probs(model: Any, ids: Sequence[int]) -> Any:
    """[N - 1], of each token but the first, by transformers' own forward."""
    import torch

    found = model(torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1)
    return found[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0]


def packed_log_probs(model: Any, sequences: Sequence[Sequence[int]]) -> list[Any]:
    """Of each sequence, out of one row."""
    import torch

    from ftray.model.packed import PackedCausalLM, PackedRow, register_packed_attention
    from ftray.model.packed_attention import packed_layout

    model.set_attn_implementation(register_packed_attention())
    ids, lengths = [token for one in sequences for token in one], [len(one) for one in sequences]
    ends = torch.tensor(lengths).cumsum(0).tolist()
    rows = [place for end, length in zip(ends, lengths, strict=True) for place in range(end - length, end - 1)]
    targets = [length - 1 for length in lengths]
    row = PackedRow(
        ids_T=torch.tensor(ids),
        positions_T=torch.cat([torch.arange(length) for length in lengths]),
        rows_N=torch.tensor(rows),
        targets_N=torch.tensor([ids[place + 1] for place in rows]),
        weights_N=torch.ones(len(rows)),
        sequences_N=torch.arange(len(lengths)).repeat_interleave(torch.tensor(targets)),
        layout=packed_layout(lengths),
    )
    return list(PackedCausalLM(model)(row).split(targets))
