"""From logits to tokens."""

import pytest
import torch

from ftray.infer.protocol import SamplingParams
from ftray.infer.torch_engine.sampler import NUCLEUS_CANDIDATES, TokenSampler, sample

LOGITS = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))


def shares(sampling: SamplingParams, *, logits=LOGITS, count: int = 2000) -> torch.Tensor:
    sampler = TokenSampler(sampling)
    drawn = [sampler.pick(logits, [], [])[0] for _ in range(count)]
    return torch.bincount(torch.tensor(drawn), minlength=len(logits)) / count


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.5, 0.3, 0.15, 0.05]),
        ({"temperature": 0.5}, [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365]),
        ({"top_p": 0.5}, [1, 0, 0, 0]),  # the first token alone holds half
        ({"top_p": 0.6}, [0.625, 0.375, 0, 0]),
        ({"top_p": 1e-50}, [1, 0, 0, 0]),
        ({"top_k": 3}, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
        ({"min_p": 0.2}, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
        ({"top_k": 3, "top_p": 0.8}, [0.625, 0.375, 0, 0]),  # of the three that are left
        ({"logit_bias": {0: -100}}, [0, 0.6, 0.3, 0.1]),
    ],
)
def test_the_distribution(settings, expected):
    torch.testing.assert_close(
        shares(SamplingParams(seed=0, **settings)), torch.tensor(expected, dtype=torch.float32), atol=0.03, rtol=0
    )


def test_a_nucleus_wider_than_the_candidates_is_whole():
    flat = torch.zeros(3 * NUCLEUS_CANDIDATES)
    drawn = shares(SamplingParams(top_p=0.9, seed=0), logits=flat, count=4000)
    assert (drawn > 0).sum() > NUCLEUS_CANDIDATES


def test_penalties_are_subtracted_or_divided_as_defined():
    def scores(sampling, prompt, generated):
        return TokenSampler(sampling)._changed(torch.tensor([2.0, -2.0, 1.0, 0.0]), prompt, generated).tolist()

    subtracted = SamplingParams(frequency_penalty=0.5, presence_penalty=0.25)
    assert scores(subtracted, [2], [0, 0, 3]) == [0.75, -2.0, 1.0, -0.75]
    assert scores(SamplingParams(repetition_penalty=2.0), [1], [0]) == [1.0, -4.0, 1.0, 0.0]


def test_rows_do_not_share_parameters_or_random_numbers():
    samplers = [
        TokenSampler(SamplingParams(temperature=0)),
        TokenSampler(SamplingParams(seed=1)),
        TokenSampler(SamplingParams(seed=1)),
    ]
    contexts = [([], [])] * 3
    rows = [sample(LOGITS.repeat(3, 1), samplers, contexts) for _ in range(20)]
    assert {row[0][0] for row in rows} == {0}
    assert [row[1] for row in rows] == [row[2] for row in rows]
    assert len({row[1][0] for row in rows}) > 1


def test_logprobs_are_told_before_temperature_and_bias():
    token, reported = TokenSampler(SamplingParams(temperature=0, logit_bias={3: 50}, logprobs=2)).pick(LOGITS, [], [])
    assert token == 3
    assert reported is not None
    assert reported.chosen == pytest.approx(-2.9957, abs=1e-3)
    assert [i for i, _ in reported.top] == [0, 1]


@pytest.mark.parametrize("settings", [{"logit_bias": {1: float("inf")}}, {"repetition_penalty": 1e-300}])
def test_scores_beyond_all_numbers_give_a_token_all_the_same(settings):
    sampler = TokenSampler(SamplingParams(seed=0, min_p=0.1, **settings))
    assert sampler.pick(torch.tensor([0.5, 1.0, 0.2]), [1], [])[0] == 1


def test_logits_that_are_no_numbers_give_a_token_all_the_same():
    broken = torch.tensor([float("nan"), 1.0, float("inf"), 0.0])
    assert TokenSampler(SamplingParams(seed=0, logprobs=1)).pick(broken, [], [])[0] == 2
