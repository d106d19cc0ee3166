"""What vLLM hands over, without vllm: its outputs by their documented fields."""

from types import SimpleNamespace

import pytest

from ftray.infer.protocol import Request
from ftray.infer.vllm_engine.outputs import Answering, token_events


@pytest.mark.parametrize(("reported", "reason"), [("abort", "error"), ("error", "error"), ("stop", "stop")])
def test_an_answer_that_ends_without_another_token_ends(reported, reason):
    answering = Answering(Request("a", [1, 2]), None, None)
    part = SimpleNamespace(index=0, token_ids=[5], text="five", finish_reason=None, logprobs=None)
    (first,) = token_events(answering, part, 0)
    assert (first.token_id, first.num_completion_tokens, first.finish_reason) == (5, 1, None)
    part = SimpleNamespace(index=0, token_ids=[], text="", finish_reason=reported, logprobs=None)
    (last,) = token_events(answering, part, 0)
    assert (last.token_id, last.num_completion_tokens, last.finish_reason) == (-1, 1, reason)
    between = SimpleNamespace(index=0, token_ids=[], text="", finish_reason=None, logprobs=None)
    assert list(token_events(answering, between, 0)) == []
