"""The section `chat` of a config, applied to a tokenizer: its chat template becomes the one that is asked for, with the
arguments set in it, so that whatever renders with that tokenizer renders alike.
"""

import copy
import datetime
import difflib
import re
from functools import cache
from importlib.resources import files
from typing import Any

from ftray.config.chat import NAMED_TEMPLATES, RENDERERS_OWN, ChatConfig
from ftray.errors import UserError

FIXED = "{% macro strftime_now(format) %}"
DATED = re.compile(r"""strftime_now\(\s*["']([^"']+)["']\s*\)""")
# How most templates write the tokens of a turn; others are words to most tokenizers.
TURN_TOKEN = re.compile(r"<\|\w+\|>|<(?:start|end)_of_turn>")
GENERATION_TAG = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")  # of transformers, for masks
BY_TRANSFORMERS = {"raise_exception", "strftime_now", "documents", "range", "namespace", "dict", "lipsum", "cycler"}


def with_chat(tokenizer: Any, chat: ChatConfig) -> Any:
    """A tokenizer that renders so; the given one where `chat` says nothing. Raises `UserError`."""
    template = tokenizer.chat_template if chat.template is None else source_of(chat.template)
    if template == tokenizer.chat_template and not chat.arguments and chat.date is None:
        return tokenizer
    if template is None:
        raise UserError("chat.arguments: the base model has no chat template that could read them; give chat.template")
    if chat.arguments:
        check_arguments(template, chat.arguments)
    sources = template if isinstance(template, dict) else {"": template}
    made = {
        name: fixed_date(source, chat.date) + assignments(chat.arguments) + source for name, source in sources.items()
    }
    other = copy.copy(tokenizer)
    other.chat_template = made if isinstance(template, dict) else made[""]
    if chat.template is not None:
        check_tokens(other, label=chat.template if chat.template in NAMED_TEMPLATES else "the file")
    return other


def source_of(template: str) -> str:
    return named_source(template) if template in NAMED_TEMPLATES else template


@cache
def named_source(name: str) -> str:
    return files("ftray.model.chat").joinpath("templates", f"{name}.jinja").read_text(encoding="utf-8")


def check_tokens(tokenizer: Any, *, label: str) -> None:
    """Raises `UserError` for control tokens that the tokenizer has not: a model could not learn where a turn ends."""
    new = sorted(set(TURN_TOKEN.findall(rendered_turns(tokenizer))) - tokenizer.get_vocab().keys())
    if not new and (tokenizer.eos_token is not None or "eos_token" not in tokenizer.chat_template):
        return
    what = f"writes {', '.join(new)}" if new else "writes the end-of-text token"
    fitting = [name for name in NAMED_TEMPLATES if fits(named_source(name), tokenizer)]
    fix = f"it has those of {' and '.join(fitting)}" if fitting else "use a base that has them"
    raise UserError(f"chat.template: {label} {what}, which this base model's tokenizer does not have; {fix}")


def rendered_turns(tokenizer: Any) -> str:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception as error:  # noqa: BLE001  a template is a program of others: what it raises, it refuses
        raise UserError(f"chat.template: cannot render a question and its answer: {error}") from None


def fits(template: str, tokenizer: Any) -> bool:
    has_end = "eos_token" not in template or tokenizer.eos_token is not None
    return has_end and set(TURN_TOKEN.findall(template)) <= tokenizer.get_vocab().keys()


def check_arguments(template: str | dict[str, str], arguments: dict[str, Any]) -> None:
    """Raises `UserError` for one that the template never reads."""
    known = variables(template if isinstance(template, str) else "\n".join(template.values()))
    for name in arguments:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            has = f"it reads {', '.join(sorted(known))}" if known else "it reads no variable of one's own"
            hint = f"did you mean {near[0]}?" if near else has
            raise UserError(f"chat.arguments.{name}: the chat template does not read it; {hint}")


def variables(template: str) -> set[str]:
    """That a caller may give."""
    from jinja2 import TemplateSyntaxError
    from jinja2.meta import find_undeclared_variables
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    try:
        parsed = environment.parse(GENERATION_TAG.sub("", template))
    except TemplateSyntaxError as error:
        raise UserError(f"chat.template: line {error.lineno}: {error.message}") from None
    return find_undeclared_variables(parsed) - BY_TRANSFORMERS - set(RENDERERS_OWN)


def is_dated(tokenizer: Any) -> bool:
    """Its chat template writes the day on which it renders."""
    template = tokenizer.chat_template
    sources = template.values() if isinstance(template, dict) else [template or ""]
    return any("strftime_now" in source and FIXED not in source for source in sources)


def fixed_date(source: str, date: str | None) -> str:
    """Jinja by which `strftime_now` writes this day. Raises `UserError` where its format is not to be seen."""
    if date is None or "strftime_now" not in source:
        return ""
    formats = DATED.findall(source)
    if len(formats) < len(re.findall(r"strftime_now\s*\(", source)):
        raise UserError("chat.date: the chat template computes the format of its date, so no other day can be set")
    day = datetime.date.fromisoformat(date)
    written = {format: day.strftime(format) for format in formats}
    return f"{FIXED}{{{{ {literal(written)}[format] }}}}{{% endmacro %}}{{{{ '' }}}}"


def assignments(arguments: dict[str, Any]) -> str:
    """Jinja that sets them. What comes behind stays as it is: a line break behind a block would be left out."""
    lines = [f"{{% set {name} = {literal(value)} %}}" for name, value in arguments.items()]
    return "".join(lines) + "{{ '' }}" if lines else ""


def literal(value: Any) -> str:
    """In Jinja's words."""
    if isinstance(value, list):
        return f"[{', '.join(map(literal, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{literal(str(key))}: {literal(item)}' for key, item in value.items())}}}"
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return repr(value)
