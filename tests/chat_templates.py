"""The stock chat templates that `trl` ships, each with a tokenizer that has its control tokens."""

import re
from bisect import bisect
from collections.abc import Sequence
from pathlib import Path

import trl
from tiny import make_tokenizer

DIRECTORY = Path(trl.__file__).parent / "chat_templates"
TRAINING = "_training"
OTHERS = Path(__file__).parent / "templates"  # that trl does not ship
ORIGINALS = sorted(path.stem for path in OTHERS.glob("*_original.jinja"))
NAMES = sorted(path.stem for path in DIRECTORY.glob("*.jinja") if not path.stem.endswith(TRAINING))
CONTROL = re.compile(
    r"<\|[A-Za-z0-9_ ]+\|>|<\uff5c[^\uff5c<>]+\uff5c>|<\|[a-z_]+>|<[a-z_]+\|>|</?s>|\[/?[A-Z_]+\]"
    "|<(?:start|end)_of_(?:turn|utterance|image)>"
)
# Added, and not special.
PLAIN = [
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
]


def template_of(name: str) -> str:
    directory = OTHERS if name in ORIGINALS else DIRECTORY
    return (directory / f"{name}.jinja").read_text(encoding="utf-8")


def tokenizer_of(name: str, template: str | None = None):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template or template_of(name)
    known = tokenizer.get_vocab()
    special = [token for token in sorted(set(CONTROL.findall(tokenizer.chat_template))) if token not in known]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.add_tokens([token for token in PLAIN if token not in tokenizer.get_vocab()])
    tokenizer.bos_token = "<|endoftext|>"
    return tokenizer


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def answer(content: str | None, **more) -> dict:
    return {"role": "assistant", "content": content, **more}


ARGUMENTS = {"city": "Rome"}
CALL = {"id": "call00001", "type": "function", "function": {"name": "look", "arguments": ARGUMENTS}}
RESULT = {"role": "tool", "content": "sunny", "name": "look", "tool_call_id": "call00001"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "description": "Of a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
TALKS = {
    "one turn": [user("What is it?"), answer("It is 4.")],
    "two turns": [user("What is it?"), answer("It is 4."), user("And then?"), answer("Five.")],
    "system": [{"role": "system", "content": "Be brief."}, user("What is it?"), answer("It is 4.")],
    "thought": [user("What is it?"), answer("It is 4.", reasoning_content="Two and two.")],
    "two thoughts": [
        user("What is it?"),
        answer("It is 4.", reasoning_content="Two and two."),
        user("And then?"),
        answer("Five.", reasoning_content="One more."),
    ],
    "call": [user("How is it?"), answer(None, tool_calls=[CALL])],
    "result": [user("How is it?"), answer("", tool_calls=[CALL]), RESULT, answer("Sunny.")],
}
WITH_TOOLS = ("call", "result")


def read_answer(renderer, ids: Sequence[int]) -> tuple[str, str]:
    """(thought, answer) of a whole answer, by its text: the other route beside the one that follows its tokens."""
    frame, decode = renderer.template.thought_frame, renderer.tokenizer.decode
    while len(ids) and int(ids[-1]) in renderer.stop_ids:
        ids = ids[:-1]
    if frame is None:
        return "", decode(ids, skip_special_tokens=True)
    thought, answer = frame.split(decode(ids))
    start = bisect(range(len(ids)), -len(answer.lstrip()) - 1, key=lambda at: -len(decode(ids[at:]).lstrip()))
    while start and decode(ids[start:]).lstrip() != answer.lstrip():  # within a character of several tokens
        start -= 1
    text = decode(ids[start:], skip_special_tokens=True)
    return thought, text if text == answer else text.lstrip()
