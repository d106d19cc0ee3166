"""A third route beside TRL's marks: the hand-written renderers of `renderers` (Prime Intellect, PyPI) give the same
prompts, train the same tokens, and read the same answers.

gpt-oss is left out: its renderer downloads a vocabulary.
"""

import json

import pytest
from chat_templates import TALKS, TOOLS, WITH_TOOLS, tokenizer_of

from ftray.errors import DataError
from ftray.model.chat import ChatRenderer, read_messages

create_renderer = pytest.importorskip("renderers").create_renderer
configs = pytest.importorskip("renderers.configs")

GLMS = ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
# By template: its renderer there, and tokens that this asks for and the template does not write.
FAMILIES = {
    "qwen3": (configs.Qwen3RendererConfig, ()),
    "qwen3_vl": (configs.Qwen3VLRendererConfig, ()),
    "qwen3_5_think": (configs.Qwen35RendererConfig, ()),
    "qwen3_6": (configs.Qwen36RendererConfig, ()),
    "qwen3_8": (configs.Qwen38RendererConfig, ()),
    "glm4moe": (configs.GLM45RendererConfig, ("[gMASK]", "<sop>", *GLMS)),
    "nemotron_3_nano": (configs.Nemotron3RendererConfig, ()),
}
# They train no token that ends an answer there; generation stops at the next role's.
ENDED_BY_NEXT = ("glm4moe",)


def families():
    for name, (config, tokens) in FAMILIES.items():
        tokenizer = tokenizer_of(name)
        known = tokenizer.get_vocab()
        tokenizer.add_special_tokens({"additional_special_tokens": [token for token in tokens if token not in known]})
        yield name, ChatRenderer(tokenizer), create_renderer(tokenizer, config())


@pytest.mark.parametrize(("name", "ours", "theirs"), families(), ids=FAMILIES)
@pytest.mark.parametrize("talk", TALKS)
def test_prompts_tokens_and_answers_agree(name, ours, theirs, talk):
    messages, tools = read_messages(TALKS[talk]), TOOLS if talk in WITH_TOOLS else []
    try:
        examples = ours.training_examples(messages, tools)
    except DataError as error:
        if "no place for reasoning_content" not in str(error):
            raise
        return
    decode = ours.tokenizer.decode
    prompt = ours.prompt_ids(messages[:-1], tools)
    assert prompt == list(theirs.render_ids(messages[:-1], tools=tools or None, add_generation_prompt=True))
    written = examples[-1].ids[len(prompt) :].tolist()
    written = written[: max(place for place, token in enumerate(written) if token in ours.stop_ids) + 1]
    rendered = theirs.render(messages, tools=tools or None)
    last = [place for place, index in enumerate(rendered.message_indices) if index == len(messages) - 1]
    sampled = decode([rendered.token_ids[place] for place in last if rendered.sampled_mask[place]])
    # They render a conversation without its prompts: what a prompt ends in is written there, and line breaks differ.
    if decode(prompt).rstrip().endswith("<think>"):
        sampled = sampled.removeprefix("<think>")
    whole = decode(written)
    if name in ENDED_BY_NEXT:
        whole = whole.removesuffix(decode(written[-1:]))
    assert whole.lstrip("\n") == sampled.lstrip("\n")
    parsed = theirs.parse_response(written, tools=tools or None, prompt_ids=prompt)
    assert (parsed.content or "").strip() == messages[-1]["content"]
    assert (parsed.reasoning_content or "").strip() == messages[-1].get("reasoning_content", "")
    expected = [call["function"]["arguments"] for call in messages[-1].get("tool_calls", [])]
    found = [
        json.loads(call.arguments) if isinstance(call.arguments, str) else call.arguments for call in calls_of(parsed)
    ]
    assert found == expected


def calls_of(parsed) -> list:
    return list(parsed.tool_calls or [])


def test_another_thought_is_another_example():
    """The twin: what agrees above is seen to differ."""
    _, ours, theirs = next(families())
    messages = read_messages(TALKS["thought"])
    other = [*messages[:-1], {**messages[-1], "reasoning_content": "Another."}]
    assert ours.training_examples(messages)[0].ids.tolist() != list(theirs.render(other).token_ids)
