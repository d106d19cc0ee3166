"""The section `chat`: named templates, a file's, arguments; what is refused, and what an adapter keeps of it."""

import json
import time

import pytest
from chat_templates import NAMES, TALKS, answer, template_of, tokenizer_of, user
from tiny import chat_rows, make_tokenizer, write_jsonl, write_peft_adapter, write_tiny_model

from ftray.artifacts.publish import publish_adapter
from ftray.config import parse_config
from ftray.config.chat import NAMED_TEMPLATES, ChatConfig
from ftray.errors import ConfigError, UserError
from ftray.infer.renderers import Renderers
from ftray.model.base import kept_chat, load_tokenizer, prepare_base
from ftray.model.chat import ChatRenderer
from ftray.model.chat.settings import is_dated, named_source, variables, with_chat
from ftray.registry import Registry
from ftray.train.prepared_data import prepare_data, rendering_as
from ftray.train.runs.inputs import inputs_of

TURNS = [{"role": "system", "content": "Be brief."}, user("One?"), answer("1"), user("Two?"), answer("2")]
# As the models' own cards and model code have them.
RENDERED = {
    "alpaca": "{bos}Be brief.\n\n### Instruction:\nOne?\n\n### Response:\n1{eos}\n\n### Instruction:\nTwo?\n\n"
    "### Response:\n2{eos}\n\n",
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nOne?<|im_end|>\n"
    "<|im_start|>assistant\n1<|im_end|>\n<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n",
    "gemma": "{bos}<start_of_turn>user\nBe brief.\n\nOne?<end_of_turn>\n<start_of_turn>model\n1<end_of_turn>\n"
    "<start_of_turn>user\nTwo?<end_of_turn>\n<start_of_turn>model\n2<end_of_turn>\n",
    "llama3": "{bos}<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nOne?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n1<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nTwo?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n2<|eot_id|>",
    "mistral": "{bos}[INST] Be brief.\n\nOne? [/INST] 1{eos}[INST] Two? [/INST] 2{eos}",
}


def tokenizer_with(*tokens: str):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    tokenizer.bos_token = "<|endoftext|>"
    return tokenizer


WITH_ALL = (
    *("<start_of_turn>", "<end_of_turn>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<|im_start|>", "<|im_end|>"),
)


def test_the_names_are_the_files_that_ship():
    assert set(NAMED_TEMPLATES) == set(RENDERED)
    assert all(named_source(name) for name in NAMED_TEMPLATES)


@pytest.mark.parametrize("name", NAMED_TEMPLATES)
def test_a_named_template_renders_as_its_models_have_it(name):
    tokenizer = with_chat(tokenizer_with(*WITH_ALL), ChatConfig(template=name))
    expected = RENDERED[name].format(bos=tokenizer.bos_token, eos=tokenizer.eos_token)
    assert tokenizer.apply_chat_template(TURNS, tokenize=False) == expected
    (example,) = ChatRenderer(tokenizer).training_examples(TURNS)
    answers = tokenizer.decode(example.ids[example.trained])
    end = {"chatml": "<|im_end|>", "gemma": "<end_of_turn>", "llama3": "<|eot_id|>"}.get(name, tokenizer.eos_token)
    assert answers.replace(" ", "") == f"1{end}2{end}"
    prompt = ChatRenderer(tokenizer).prompt_ids(TURNS[:-1])
    assert example.ids[: len(prompt)].tolist() == prompt


def test_arguments_are_set_as_transformers_passes_them():
    """The other route: `apply_chat_template(..., name=value)`, for every stock template and variable of on and off."""
    tried = 0
    for name in NAMES:
        tokenizer = tokenizer_of(name)
        switches = [v for v in sorted(variables(template_of(name))) if v.startswith(("enable", "think", "clear"))]
        for variable in switches:
            for value in (False, True):
                ours = with_chat(tokenizer, ChatConfig(arguments={variable: value}))
                for talk in ("one turn", "two thoughts"):
                    for ask in (False, True):
                        how = {"tokenize": False, "add_generation_prompt": ask}
                        try:
                            expected = tokenizer.apply_chat_template(TALKS[talk][:-1], **how, **{variable: value})
                        except Exception:  # noqa: BLE001  the template refuses it
                            continue
                        assert ours.apply_chat_template(TALKS[talk][:-1], **how) == expected, (name, variable)
                        tried += 1
    assert tried > 100


def test_values_of_arguments_are_what_yaml_has():
    template = "{{ a is none }}|{{ b }}|{{ c[1] }}|{{ d['x y'] }}|{{ e }}|{{ f }}{% for m in messages %}{% endfor %}"
    tokenizer = make_tokenizer()
    values = {"a": None, "b": True, "c": [1, "two"], "d": {"x y": 2.5}, "e": 'it\'s "so" {{ \n }}', "f": -3}
    tokenizer.chat_template = template
    shown = with_chat(tokenizer, ChatConfig(arguments=values)).apply_chat_template([user("a")], tokenize=False)
    assert shown == 'True|True|two|2.5|it\'s "so" {{ \n }}|-3'


DATED = [name for name in NAMES if is_dated(tokenizer_of(name))]


@pytest.mark.parametrize("name", DATED)
def test_a_fixed_date_is_the_days_own_rendering(name):
    tokenizer = tokenizer_of(name)
    today, another = (with_chat(tokenizer, ChatConfig(date=day)) for day in (time.strftime("%Y-%m-%d"), "2021-03-04"))
    turns = TALKS["one turn"][:1]
    how = {"tokenize": False, "add_generation_prompt": True}
    assert today.apply_chat_template(turns, **how) == tokenizer.apply_chat_template(turns, **how)
    assert another.apply_chat_template(turns, **how) != tokenizer.apply_chat_template(turns, **how)
    assert "2021" in another.apply_chat_template(turns, **how)
    assert not is_dated(another)
    assert is_dated(tokenizer)


def test_a_run_that_resumes_on_another_day_has_the_tokens_of_the_first(tmp_path):
    """The twin: without the day that it began, they differ."""
    base = write_tiny_model(tmp_path / "base", tokenizer=tokenizer_of("llama3_2"))
    data = write_jsonl(tmp_path / "rows.jsonl", chat_rows(3))
    text = f"kind: run\nname: a\nbase_model: {base}\nmax_steps: 1\ndata: {{train: {data}}}\n"
    run = parse_config(text, kind="run", source="test")
    lines: list[str] = []
    began, first = prepare_data(run, log=lines.append, date="2021-03-04")
    assert any("writes a date: 2021-03-04" in line for line in lines)
    assert began.chat.date == "2021-03-04"
    assert rendering_as(began, run).chat == began.chat
    assert inputs_of(began, first)["date"] == "2021-03-04"
    _, resumed = prepare_data(run, log=lines.append, date=inputs_of(began, first)["date"])
    today, other = prepare_data(run, log=lines.append)
    assert resumed.digest == first.digest != other.digest
    assert today.chat.date == time.strftime("%Y-%m-%d")
    assert began.described["chat"]["date"] == "2021-03-04"  # which its adapter keeps


@pytest.mark.parametrize(
    ("chat", "named"),
    [
        ({"template": "chatm"}, "did you mean chatml"),
        ({"template": "no/such.jinja"}, "no such file"),
        ({"template": "pyproject.toml"}, "holds no Jinja"),
        ({"arguments": {"messages": []}}, "given by ftray"),
        ({"arguments": {"a-b": 1}}, "no name of a variable"),
        ({"date": "yesterday"}, "a date is YYYY-MM-DD"),
        ({"templat": "chatml"}, "did you mean 'template'"),
    ],
)
def test_what_a_config_cannot_mean_is_refused(chat, named):
    text = "kind: run\nname: a\nbase_model: smollm2-135m\nmax_steps: 1\ndata: {train: a.jsonl}\nchat: "
    with pytest.raises(ConfigError, match=named):
        parse_config(text + json.dumps(chat), kind="run", source="test")


def test_what_a_base_cannot_render_is_refused():
    plain = make_tokenizer()
    with pytest.raises(UserError, match="gemma writes <end_of_turn>, <start_of_turn>, which"):
        with_chat(plain, ChatConfig(template="gemma"))
    with pytest.raises(UserError, match="enable_thinkin: the chat template does not read it; did you mean enable_thin"):
        with_chat(tokenizer_of("qwen3"), ChatConfig(arguments={"enable_thinkin": False}))
    with pytest.raises(UserError, match="cannot render"):
        with_chat(plain, ChatConfig(template="{{ raise_exception('never') }}"))
    with pytest.raises(UserError, match="line 1"):
        with_chat(plain, ChatConfig(template="{% if %}", arguments={"a": 1}))
    plain.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        with_chat(plain, ChatConfig(arguments={"enable_thinking": False}))


def test_a_base_without_a_template_gets_one(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    base = write_tiny_model(tmp_path / "base", tokenizer=tokenizer)
    prepared = prepare_base(str(base), chat=ChatConfig(template="alpaca"))
    renderer = ChatRenderer(load_tokenizer(prepared))
    text = renderer.tokenizer.decode(renderer.prompt_ids([user("One?")]))
    assert text.endswith("### Instruction:\nOne?\n\n### Response:\n")


def test_a_file_is_kept_as_its_text(tmp_path):
    file = tmp_path / "own.jinja"
    file.write_text(template_of("qwen3"))
    chat = ChatConfig(template=str(file))
    file.unlink()
    assert chat.template == template_of("qwen3")
    assert ChatConfig.model_validate(chat.model_dump()) == chat  # as workers and finished runs read it again


def test_an_adapter_of_others_is_served_by_the_template_beside_it(tmp_path):
    """As TRL and PEFT's users save one. The twin: without the file it is the base's."""
    base = write_tiny_model(tmp_path / "base", tokenizer=tokenizer_with(*WITH_ALL))
    directory = write_peft_adapter(tmp_path / "adapter", base, rank=4, seed=1)
    registry = Registry(str(tmp_path / "registry"))
    plain = publish_adapter(registry, "a", directory)
    (directory / "chat_template.jinja").write_text(named_source("llama3"))
    own = publish_adapter(registry, "a", directory)
    assert "chat" not in plain.metadata
    assert kept_chat(directory) == ChatConfig.model_validate(own.metadata["chat"])
    renderers = Renderers(prepare_base(str(base)))
    texts = [
        renderers.of(chat).tokenizer.decode(renderers.of(chat).prompt_ids([user("One?")]))
        for chat in (None, kept_chat(directory))
    ]
    assert "<|start_header_id|>" not in texts[0]
    assert texts[1].endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")
