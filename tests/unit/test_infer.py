import pytest

from ftray.config.serve import AdaptersConfig, EngineConfig
from ftray.errors import AdapterError, RequestError, UserError
from ftray.infer.engines import generate, load_adapter
from ftray.infer.protocol import Request, SamplingParams, StructuredOutput
from ftray.infer.structure import GrammarMatcher
from ftray.infer.text import TextStream
from ftray.infer.torch_engine.engine import TorchEngine
from ftray.model.hardware import choose_hardware


def shown(renderer, text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    """Text pushed token by token (bytes here), as pieces, and whether a stop string ended it."""
    stream = TextStream(renderer.tokenizer, stop)
    pieces = []
    for token in renderer.tokenizer(text, add_special_tokens=False)["input_ids"]:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    pieces.append(stream.finish())
    return pieces, stream.stopped


def test_text_comes_whole_characters_at_a_time(renderer):
    pieces, _ = shown(renderer, "zürich 東京 👋")
    assert "".join(pieces) == "zürich 東京 👋"
    assert not any("\ufffd" in piece for piece in pieces)


def test_bytes_that_are_no_character_do_not_hold_the_text_back(renderer):
    """As `logit_bias` may force them: what is held stays short, and what follows is shown."""
    byte = next(token for token in range(40, 250) if renderer.tokenizer.decode([token]) == "\ufffd")
    stream = TextStream(renderer.tokenizer, ())
    pieces = [stream.push(byte) for _ in range(100)]
    assert len(stream._ids) - stream._decoded < 8
    assert sum(map(len, pieces)) > 90


def test_a_stop_string_is_never_shown_not_even_its_beginning(renderer):
    pieces, stopped = shown(renderer, "one END two", ("END",))
    assert ("".join(pieces), stopped) == ("one ", True)
    pieces, stopped = shown(renderer, "one EN", ("END",))
    assert ("".join(pieces), stopped) == ("one EN", False)  # it did not become the stop string
    assert "".join(pieces[:-1]) == "one "


def test_a_stop_string_before_half_a_character_is_not_shown_either(renderer):
    """The last token, which the answer's limit cuts off, completes the one and begins the other."""
    stream = TextStream(renderer.tokenizer, ("END",))
    *whole, cut = renderer.tokenizer("one END東", add_special_tokens=False)["input_ids"][:-1]
    pieces = [stream.push(token) for token in whole[:-1]]
    stream._tokenizer = JoinedTokens(renderer.tokenizer, whole[-1], cut)
    pieces += [stream.push(JoinedTokens.JOINED), stream.finish()]
    assert ("".join(pieces), stream.stopped) == ("one ", True)


class JoinedTokens:
    """A tokenizer with one token for two."""

    JOINED = 10**6

    def __init__(self, tokenizer, first: int, second: int):
        self._tokenizer, self._pair = tokenizer, [first, second]

    def decode(self, ids, **options) -> str:
        return self._tokenizer.decode(
            [own for i in ids for own in (self._pair if i == self.JOINED else [i])], **options
        )


@pytest.fixture(scope="module")
def engine(tiny_base):
    config = EngineConfig(context_tokens=64, kv_cache_tokens=256, max_sequences=4, max_prefill_tokens=16)
    return TorchEngine(tiny_base, choose_hardware(), config, AdaptersConfig(max_rank=8))


def test_requests_that_can_never_run_are_refused(engine):
    with pytest.raises(RequestError, match=r"maximum context length is 64 tokens .* resulted in 64 tokens") as error:
        engine.add(Request("a", [5] * 64))
    assert error.value.code == "context_length_exceeded"
    with pytest.raises(UserError, match="empty"):
        engine.add(Request("a", []))
    with pytest.raises(UserError, match="not loaded"):
        engine.add(Request("a", [5], adapter="ghost@1"))
    assert not engine.has_work


def test_max_tokens_is_a_cap_within_the_context(engine):
    engine.add(Request("a", [5] * 60, SamplingParams(max_tokens=4096, temperature=0, ignore_eos=True)))
    events = []
    while engine.has_work:
        events += engine.step()
    assert (len(events), events[-1].finish_reason) == (4, "length")


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_k": -1},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"n": 0},
        {"max_tokens": 0},
        {"logprobs": -1},
        {"prompt_logprobs": -1},
    ],
    ids=str,
)
def test_a_value_out_of_its_range_is_refused_and_ends_nobody_elses_answer(engine, wrong):
    engine.add(Request("other", [5, 6], SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)))
    with pytest.raises(UserError, match=f"{next(iter(wrong))}: .* is out of range"):
        engine.add(Request("a", [5], SamplingParams(**wrong)))
    events = [event for _ in range(2) for event in engine.step()]
    assert [event.request_id for event in events] == ["other"] * 2
    assert not engine.has_work


def test_a_grammar_over_its_limits_ends_its_answer_as_no_answer(engine, monkeypatch):
    """And not as one that has stopped, with half of what was asked for."""
    answers = []
    for fails in (False, True):
        engine.add(
            Request(
                "a", [5], SamplingParams(temperature=0, max_tokens=8, structure=StructuredOutput("regex", "[a-f]{3}"))
            )
        )
        if fails:
            monkeypatch.setattr(GrammarMatcher, "accept", lambda matcher, token: matcher._matcher.consume_token(0))
        events = []
        while engine.has_work:
            events += engine.step()
        answers.append([event.finish_reason for event in events])
    assert answers == [[None, None, None, "stop"], ["structure"]]


def test_an_answer_ends_at_its_limit_and_says_so(engine):
    engine.add(Request("a", [5, 6, 7], SamplingParams(temperature=0, max_tokens=3)))
    events = []
    while engine.has_work:
        events += engine.step()
    assert [event.num_completion_tokens for event in events] == [1, 2, 3]
    assert events[-1].finish_reason in ("length", "stop")
    assert all(event.finish_reason is None for event in events[:-1])


def test_a_long_prompt_comes_in_pieces_and_stops_nobody(engine):
    engine.add(Request("a", [5] * 10, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)))
    assert [event.request_id for event in engine.step()] == ["a"]
    engine.add(Request("b", list(range(5, 45)), SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)))
    # 40 tokens at 16 a step: b's first token comes in the third step, and a gets one in each
    assert [sorted(event.request_id for event in engine.step()) for _ in range(3)] == [["a"], ["a"], ["a", "b"]]
    while engine.has_work:
        engine.step()


def test_cancelling_frees_the_place_at_once(engine):
    engine.add(Request("a", [5, 6], SamplingParams(temperature=0, max_tokens=20)))
    engine.step()
    engine.cancel("a")
    assert not engine.has_work
    assert engine.stats().kv_tokens_used == 0


def test_an_adapter_over_the_rank_limit_is_refused(engine, adapters):
    with pytest.raises(AdapterError, match=r"rank 16 is over this endpoint's adapters\.max_rank"):
        load_adapter(engine, "big@1", adapters["r16"])
    load_adapter(engine, "small@1", adapters["r4"])
    assert generate(engine, [Request("x", [5, 6], SamplingParams(temperature=0, max_tokens=2), "small@1")]).keys() == {
        "x"
    }
    engine.unload_adapter("small@1")
    assert engine.stats().adapters == ()
