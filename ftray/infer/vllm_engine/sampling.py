"""A request's sampling, as vLLM takes it."""

# pyright: reportMissingImports=false
from typing import Any

from ftray.infer.protocol import SamplingParams
from ftray.infer.seeds import derived_seed
from ftray.infer.torch_engine.sampler import GREEDY_BELOW


def sampling_params(s: SamplingParams, max_tokens: int, stop_ids: set[int]) -> Any:
    """A `vllm.SamplingParams`."""
    import vllm
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    n_greedy = s.n > 1 and s.temperature < GREEDY_BELOW  # which vLLM refuses; the likeliest of one is the same
    structure = None
    if s.structure is not None:
        field_of = {"json_schema": "json", "regex": "regex"}
        structure = StructuredOutputsParams(**{field_of[s.structure.kind]: s.structure.text})
    return vllm.SamplingParams(
        n=s.n,
        temperature=1.0 if n_greedy else s.temperature,
        top_p=1.0 if n_greedy else s.top_p,
        top_k=1 if n_greedy else s.top_k,
        min_p=s.min_p,
        frequency_penalty=s.frequency_penalty,
        presence_penalty=s.presence_penalty,
        repetition_penalty=s.repetition_penalty,
        logit_bias=dict(s.logit_bias) or None,
        seed=None if s.seed is None else derived_seed(s.seed),  # vLLM adds the answer's number
        max_tokens=max_tokens,
        stop=list(s.stop),
        stop_token_ids=sorted(stop_ids),
        ignore_eos=s.ignore_eos,
        logprobs=s.logprobs,
        structured_outputs=structure,
        output_kind=RequestOutputKind.DELTA,
    )
