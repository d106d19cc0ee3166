"""What every engine must do. A test module of an engine subclasses `EngineContract` and gives the fixtures
`engine` (one that has nothing loaded), `adapters` (PEFT directories by name), `base_directory` and `prompts`."""

import dataclasses
import json
import re
import shutil

import pytest
import torch

from ftray.errors import AdapterError, UserError
from ftray.infer.engines import load_adapter
from ftray.infer.protocol import Request, SamplingParams, StructuredOutput

# Mixed batches change the rounding of a matmul: where the top two logits are nearer than this, either may win.
NEAR_TIE = 1e-4


def greedy(**more) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 10, "ignore_eos": True} | more)


def run(engine, requests: list[Request]) -> dict[tuple[str, int], list]:
    """All events of every answer, by (request, index)."""
    for request in requests:
        engine.add(request)
    events: dict[tuple[str, int], list] = {}
    while engine.has_work:
        for event in engine.step():
            events.setdefault((event.request_id, event.index), []).append(event)
    return events


def tokens(events: list) -> list[int]:
    return [event.token_id for event in events]


def answers(engine, requests: list[Request]) -> dict[str, list[int]]:
    """Tokens of each request's (last) answer."""
    return {name: tokens(events) for (name, _), events in run(engine, requests).items()}


def text(events: list) -> str:
    return "".join(event.text for event in events)


class Reference:
    """peft and transformers, one sequence at a time."""

    def __init__(self, base_directory, adapters):
        self._base_directory = base_directory
        self._adapters = adapters
        self._models: dict[str | None, torch.nn.Module] = {}

    def log_probs(self, name: str | None, ids: list[int]) -> torch.Tensor:
        """[len(ids), V]."""
        with torch.no_grad():
            return self._model(name)(torch.tensor([ids])).logits[0].log_softmax(-1)

    def generate(self, prompt: list[int], **options) -> list[int]:
        """The base's likeliest tokens, whatever they are."""
        never = self._model(None).config.vocab_size  # no token ends it
        ids = torch.tensor([prompt])
        answer = self._model(None).generate(ids, do_sample=False, eos_token_id=never, pad_token_id=0, **options)
        return answer[0, len(prompt) :].tolist()

    def _model(self, name: str | None):
        if name not in self._models:
            from peft import PeftModel
            from transformers import AutoModelForCausalLM

            model = AutoModelForCausalLM.from_pretrained(self._base_directory, dtype=torch.float32)
            self._models[name] = model if name is None else PeftModel.from_pretrained(model, self._adapters[name])
        return self._models[name]

    def check_greedy(self, name: str | None, prompt: list[int], answer: list[int]) -> None:
        """Each token is the likeliest, or as likely as it within rounding."""
        log_probs = self.log_probs(name, [*prompt, *answer])[len(prompt) - 1 : -1]
        best = log_probs.max(-1).values
        chosen = log_probs[torch.arange(len(answer)), torch.tensor(answer)]
        assert (best - chosen).max() < NEAR_TIE, f"{name}: {answer} is not what greedy decoding gives"


class EngineContract:
    @pytest.fixture(scope="class")
    def reference(self, base_directory, adapters):
        return Reference(base_directory, adapters)

    @pytest.fixture
    def loaded(self, engine, adapters):
        for name, directory in adapters.items():
            load_adapter(engine, name, directory)
        yield engine
        for name in adapters:
            engine.unload_adapter(name)

    def test_prompts_of_another_salt_are_not_found_in_the_cache(self, engine):
        """What one tenant asked, another could find out by guessing, if they were."""
        prompt = [3 + i % 40 for i in range(100)]
        found = {}
        for name, salt in (("a", "acme"), ("b", "rival"), ("c", ""), ("d", "acme"), ("e", "")):
            (events,) = run(engine, [Request(name, prompt, greedy(max_tokens=2), cache_salt=salt)]).values()
            found[name] = events[0].num_cached_prompt_tokens
        assert (found["a"], found["b"], found["c"]) == (0, 0, 0)
        assert found["d"] == found["e"] > 0

    def test_events_of_an_answer(self, engine, prompts):
        events = run(engine, [Request("a", prompts[0], greedy(max_tokens=4))])[("a", 0)]
        assert [event.num_completion_tokens for event in events] == [1, 2, 3, 4]
        assert [event.finish_reason for event in events] == [None, None, None, "length"]
        assert not engine.has_work
        assert engine.stats().num_running == engine.stats().num_waiting == 0

    def test_every_answer_of_a_mixed_batch_is_its_own_models(self, loaded, prompts, adapters, reference):
        names = [*adapters, None]
        requests = [Request(f"{i}", prompt, greedy(), names[i % len(names)]) for i, prompt in enumerate(prompts * 2)]
        answers = run(loaded, requests)
        for request in requests:
            reference.check_greedy(request.adapter, list(request.prompt_ids), tokens(answers[(request.id, 0)]))

    def test_the_reference_finds_another_adapters_answer(self, loaded, prompts, adapters, reference):
        """The twin of the above."""
        first, second = list(adapters)[:2]
        answer = tokens(run(loaded, [Request("a", prompts[0], greedy(), first)])[("a", 0)])
        with pytest.raises(AssertionError, match="not what greedy decoding gives"):
            reference.check_greedy(second, prompts[0], answer)

    def test_logprobs_are_the_models(self, loaded, prompts, adapters, reference):
        name = next(iter(adapters))
        events = run(loaded, [Request("a", prompts[0], greedy(logprobs=3), name)])[("a", 0)]
        want = reference.log_probs(name, [*prompts[0], *tokens(events)])[len(prompts[0]) - 1 : -1]
        for row, event in zip(want, events, strict=True):
            assert event.logprobs.chosen == pytest.approx(float(row[event.token_id]), abs=1e-3)
            assert [value for _, value in event.logprobs.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-3)

    def test_prompt_logprobs_are_the_models(self, loaded, prompts, adapters, reference):
        """Also where the prompt is in the cache already, is computed in pieces, and others run beside it."""
        name = next(iter(adapters))
        company = [Request(f"{i}", prompt, greedy(), name) for i, prompt in enumerate(prompts)]
        asked = Request("a", prompts[-1], greedy(max_tokens=2, prompt_logprobs=2), name)
        run(loaded, [Request("before", prompts[-1], greedy(), name)])
        first, second = run(loaded, [*company, asked])[("a", 0)]
        want = reference.log_probs(name, list(prompts[-1]))[:-1]
        assert len(first.prompt_logprobs) == len(want)
        assert second.prompt_logprobs is None
        for row, token, reported in zip(want, prompts[-1][1:], first.prompt_logprobs, strict=True):
            assert reported.chosen == pytest.approx(float(row[token]), abs=1e-3)
            assert [value for _, value in reported.top] == pytest.approx(row.topk(2).values.tolist(), abs=1e-3)

    def test_a_seed_gives_the_same_answers_in_any_company(self, loaded, prompts, adapters):
        name = next(iter(adapters))
        wanted = Request("x", prompts[0], SamplingParams(temperature=0.9, top_p=0.9, seed=7, n=2, max_tokens=8), name)
        alone = run(loaded, [wanted])
        company = [Request(f"{i}", prompt, SamplingParams(max_tokens=8)) for i, prompt in enumerate(prompts)]
        together = run(loaded, [*company, wanted])
        for index in (0, 1):
            assert tokens(alone[("x", index)]) == tokens(together[("x", index)])
        assert tokens(alone[("x", 0)]) != tokens(alone[("x", 1)])

    def test_top_k_of_one_and_a_tiny_nucleus_are_greedy(self, engine, prompts):
        want = tokens(run(engine, [Request("a", prompts[0], greedy())])[("a", 0)])
        for sampling in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
            chosen = greedy(**{"temperature": 1.0, "seed": 3} | sampling)
            assert tokens(run(engine, [Request("a", prompts[0], chosen)])[("a", 0)]) == want

    def test_bias_and_penalties(self, engine, prompts):
        want = tokens(run(engine, [Request("a", prompts[0], greedy(logit_bias={9: 100}))])[("a", 0)])
        assert want == [9] * 10
        alternating = greedy(logit_bias={9: 60, 11: 60}, frequency_penalty=2.0, max_tokens=40)
        counts = tokens(run(engine, [Request("a", prompts[0], alternating)])[("a", 0)])
        assert {9, 11} == set(counts)
        assert abs(counts.count(9) - counts.count(11)) < 20

    def test_the_presence_penalty_is_taken_from_tokens_of_the_answer(self, engine, prompts, reference):
        def wanted(penalty: float) -> list[int]:
            ids = list(prompts[0])
            for _ in range(20):
                scores = reference.log_probs(None, ids)[-1].clone()
                scores[list(set(ids[len(prompts[0]) :]))] -= penalty
                ids.append(int(scores.argmax()))
            return ids[len(prompts[0]) :]

        asked = greedy(presence_penalty=2.0, max_tokens=20)
        assert tokens(run(engine, [Request("a", prompts[0], asked)])[("a", 0)]) == wanted(2.0) != wanted(0.0)

    def test_the_repetition_penalty_is_transformers(self, engine, prompts, reference):
        for penalty in (1.0, 1.7):
            asked = greedy(repetition_penalty=penalty, max_tokens=20)
            got = tokens(run(engine, [Request("a", prompts[2], asked)])[("a", 0)])
            want = reference.generate(prompts[2], repetition_penalty=1.7, max_new_tokens=20)
            assert (got == want) == (penalty == 1.7)

    def test_a_stop_string_ends_the_answer_and_is_not_shown(self, engine, prompts):
        whole = text(run(engine, [Request("a", prompts[0], greedy(max_tokens=20))])[("a", 0)])
        stop = whole[len(whole) // 2 :][:2]
        events = run(engine, [Request("a", prompts[0], greedy(max_tokens=20, stop=(stop,)))])[("a", 0)]
        assert text(events) == whole[: whole.index(stop)]
        assert events[-1].finish_reason == "stop"

    def test_of_a_stopped_answer_every_token_tells_its_logprob(self, engine, prompts):
        """Also those whose text is not shown, since it may become the stop string, or is it."""
        asked = greedy(max_tokens=20, logprobs=1)
        whole = run(engine, [Request("a", prompts[0], asked)])[("a", 0)]
        stop = text(whole)[len(text(whole)) // 2 :][:3]
        events = run(engine, [Request("a", prompts[0], dataclasses.replace(asked, stop=(stop,)))])[("a", 0)]
        assert text(events) == text(whole)[: text(whole).index(stop)]
        assert tokens(events) == tokens(whole)[: len(events)]
        for event, same in zip(events, whole, strict=False):
            assert event.logprobs.chosen == pytest.approx(same.logprobs.chosen, abs=1e-4)

    @pytest.mark.parametrize("is_tenant", [True, False], ids=["a-tenant-of-its-own", "one-more-of-the-flood"])
    def test_a_flood_does_not_keep_a_light_tenant_waiting(self, loaded, prompts, adapters, is_tenant):
        """Its first token comes when the answers that run have ended; as one more of the flood, the twin, after all."""
        heavy, light = list(adapters)[:2]
        places, per_answer, rounds = loaded.config.max_sequences, 12, 4
        for number in range(places * rounds):
            prompt = [number % 50 + 5, *prompts[0]]
            loaded.add(Request(f"{number}", prompt, greedy(max_tokens=per_answer), heavy, tenant="crawler"))
        tenant, adapter = ("person", light) if is_tenant else ("crawler", heavy)
        loaded.add(Request("light", prompts[1], greedy(max_tokens=2), adapter, tenant=tenant))
        order: list[str] = []
        while loaded.has_work:
            order += [event.request_id for event in loaded.step()]
        before = order.index("light")
        if is_tenant:
            assert before <= places * per_answer + places
        else:
            assert before >= places * per_answer * (rounds - 1)

    def test_structured_answers(self, engine, prompts):
        pattern = StructuredOutput("regex", "(yes|no), [0-9]{3}")
        schema = {
            "type": "object",
            "properties": {"age": {"type": "integer", "maximum": 120, "minimum": 0}, "ok": {"type": "boolean"}},
            "required": ["age", "ok"],
            "additionalProperties": False,
        }
        asked = StructuredOutput("json_schema", json.dumps(schema))
        requests = [
            Request("regex", prompts[0], SamplingParams(temperature=1, seed=1, max_tokens=40, structure=pattern)),
            Request("json", prompts[1], SamplingParams(temperature=1, seed=1, max_tokens=200, structure=asked)),
            Request("free", prompts[2], greedy()),
        ]
        answers = run(engine, requests)
        assert re.fullmatch("(yes|no), [0-9]{3}", text(answers[("regex", 0)]))
        assert answers[("regex", 0)][-1].finish_reason == "stop"
        assert set(json.loads(text(answers[("json", 0)]))) == {"age", "ok"}
        assert tokens(answers[("free", 0)]) == tokens(run(engine, [requests[2]])[("free", 0)])

    def test_requests_that_can_never_run_are_refused(self, engine, prompts):
        with pytest.raises(UserError, match=r"maximum context length is 256 tokens"):
            engine.add(Request("a", [5] * 256, greedy(max_tokens=1)))
        with pytest.raises(UserError, match="empty"):
            engine.add(Request("a", [], greedy()))
        with pytest.raises(UserError, match="not loaded"):
            engine.add(Request("a", prompts[0], greedy(), "ghost@1"))
        with pytest.raises(UserError, match="response_format: "):
            engine.add(Request("a", prompts[0], greedy(structure=StructuredOutput("regex", "("))))
        with pytest.raises(UserError, match=f"prompt: {engine.vocab_size} is no token id of this model"):
            engine.add(Request("a", [5, engine.vocab_size], greedy()))
        with pytest.raises(UserError, match="logit_bias: -1"):
            engine.add(Request("a", prompts[0], greedy(logit_bias={-1: 1.0})))
        assert not engine.has_work

    def test_cancelling_ends_all_answers_of_a_request(self, engine, prompts):
        engine.add(Request("a", prompts[0], greedy(max_tokens=100, n=3)))
        engine.add(Request("b", prompts[1], greedy(max_tokens=5)))
        engine.step()
        engine.cancel("a")
        rest = run(engine, [])
        assert {name for name, _ in rest} == {"b"}
        assert engine.stats().num_running == 0

    def test_other_weights_under_one_name_are_not_stale(self, engine, prompts, adapters, reference):
        first, second = list(adapters)[:2]
        long_prompt = (prompts[0] * 40)[:64]
        for name in (first, second, first):
            load_adapter(engine, "swapped", adapters[name])
            answer = tokens(run(engine, [Request("a", long_prompt, greedy(), "swapped")])[("a", 0)])
            reference.check_greedy(name, long_prompt, answer)
            if name == first:  # once it is replaced without
                engine.unload_adapter("swapped")

    def test_weights_in_use_neither_change_nor_go(self, engine, prompts, adapters, reference):
        first, second = list(adapters)[:2]
        load_adapter(engine, "swapped", adapters[first])
        engine.add(Request("a", prompts[0], greedy(), "swapped"))
        given = [event.token_id for event in engine.step()]
        with pytest.raises(AdapterError, match="swapped: answers that use it have not ended"):
            load_adapter(engine, "swapped", adapters[second])
        with pytest.raises(AdapterError, match="swapped: answers that use it have not ended"):
            engine.unload_adapter("swapped")
        reference.check_greedy(first, prompts[0], [*given, *tokens(run(engine, [])[("a", 0)])])
        load_adapter(engine, "swapped", adapters[second])
        engine.unload_adapter("swapped")

    def test_a_bad_adapter_is_refused_and_harms_nobody(self, loaded, prompts, adapters, tmp_path):
        name = next(iter(adapters))
        before = tokens(run(loaded, [Request("a", prompts[0], greedy(), name)])[("a", 0)])
        loaded.add(Request("beside", prompts[0], greedy(), name))
        loaded.step()
        for damage in (truncate, poison, rename_a_module, widen):
            bad = shutil.copytree(adapters[name], tmp_path / damage.__name__)
            damage(bad)
            with pytest.raises(AdapterError, match="bad@1"):
                load_adapter(loaded, "bad@1", bad)
        with pytest.raises(UserError, match="not loaded"):
            loaded.add(Request("b", prompts[0], greedy(), "bad@1"))
        run(loaded, [])
        assert tokens(run(loaded, [Request("a", prompts[0], greedy(), name)])[("a", 0)]) == before


def truncate(directory) -> None:
    path = directory / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def change(directory, edit) -> None:
    """`edit(name, tensor)` gives each tensor's new name and value."""
    from safetensors.torch import load_file, save_file

    path = directory / "adapter_model.safetensors"
    save_file(dict(edit(name, tensor) for name, tensor in load_file(path).items()), path)


def poison(directory) -> None:
    change(directory, lambda name, tensor: (name, tensor.fill_(float("nan"))))


def rename_a_module(directory) -> None:
    change(directory, lambda name, tensor: (name.replace("q_proj", "r_proj"), tensor))


def widen(directory) -> None:
    """As trained on a wider base."""
    change(directory, lambda name, tensor: (name, torch.ones(len(tensor), 77) if "lora_A" in name else tensor))
