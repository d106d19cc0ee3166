"""Conversations: chat messages, ShareGPT's, or a prompt and a completion."""

from collections.abc import Callable, Sequence
from typing import Any

from ftray.config.data import ColumnsConfig
from ftray.data.formats.columns import check_columns
from ftray.data.formats.protocol import Conversation
from ftray.data.formats.turns import parsed, read_conversation, read_prompt, read_tools, read_turns
from ftray.errors import DataError

ALPACA = ("instruction", "output")
BESIDE_ALPACA = ("input", "system", "history")
TOOLS, SYSTEM = "tools", "system"


def row_reader(columns: ColumnsConfig | None, have: Sequence[str], *, key: str) -> Callable[[dict], Conversation]:
    """Conversations. Chooses the mapping once for the whole set; raises `DataError` when a column is not there."""
    if columns is None and is_alpaca(have):
        return read_alpaca
    if columns is None:
        columns = guess_conversation(have, key=key)
    check_columns(columns, have, key=key)
    tools, system = columns.tools or TOOLS, columns.system or SYSTEM  # a row may have them that the first ones lack
    if columns.messages is not None:
        column = columns.messages
        return lambda row: read_conversation(row[column], tools=row.get(tools), system=row.get(system))
    if columns.prompt is None or columns.completion is None:
        raise DataError(f"{key}: data.columns names no conversation; give `messages`, or `prompt` and `completion`")
    return lambda row: prompt_and_completion(row, columns, tools=tools)


def is_alpaca(have: Sequence[str]) -> bool:
    return set(ALPACA) <= set(have)


def guess_conversation(have: Sequence[str], *, key: str) -> ColumnsConfig:
    for name in ("messages", "conversations", "conversation"):
        if name in have:
            return ColumnsConfig(messages=name)
    if "prompt" in have and "completion" in have:
        return ColumnsConfig(prompt="prompt", completion="completion", system=SYSTEM if SYSTEM in have else None)
    raise DataError(f"{key}: the columns are {', '.join(have)}; {advice(have)}")


# Names that are known to be questions, and their answers.
ASKED, ANSWERED = (
    ("prompt", "question", "query", "input", "instruction"),
    ("completion", "response", "answer", "output"),
)


LABELS = ("label", "category", "class", "intent")


def advice(have: Sequence[str]) -> str:
    """What to do about columns that say nothing by themselves."""
    if {"chosen", "rejected"} <= set(have):
        return "these are pairs: objective: {type: dpo}"
    if "label" in have and {"completion", "messages"} & set(have):
        return "these are rated answers, which no objective of ftray trains on yet"
    if len(have) == 1 and (separator := next((mark for mark in (";", "\t", "|") if mark in have[0]), None)):
        return f"the file has one column: it is separated by {separator!r}, and must be by ','"
    if "text" in have and (label := next((name for name in LABELS if name in have), None)):
        return f"texts and their classes: data.columns: {{prompt: text, completion: {label}}}"
    if "text" in have:
        return "texts are trained on with objective: {type: text}"
    asked, answered = (next((n for n in names if n in have), None) for names in (ASKED, ANSWERED))
    mapping = f"prompt: {asked}, completion: {answered}" if asked and answered else "prompt: ..., completion: ..."
    return (
        "without data.columns a row needs `messages`, `prompt` and `completion`, or Alpaca's `instruction` and "
        f"`output`. Example: data.columns: {{{mapping}}}"
    )


def read_alpaca(row: dict[str, Any]) -> Conversation:
    """Stanford Alpaca's rows: instruction, input, output, and where they are there system and history (pairs of a
    question and its answer that come before)."""
    turns = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    history = parsed(row.get("history")) or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise DataError("history must be a list of pairs: a question and its answer")
    for asked, answered in history:
        turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    question = "\n\n".join(str(row[name]) for name in ("instruction", "input") if row.get(name) not in (None, ""))
    if not question or row["output"] in (None, ""):
        raise DataError("the instruction and the output must not be empty")
    turns += [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]
    return read_conversation(turns)


def columns_read(columns: ColumnsConfig | None, have: Sequence[str], *, key: str) -> set[str]:
    if columns is None and is_alpaca(have):
        return {*ALPACA, *BESIDE_ALPACA}
    columns = columns or guess_conversation(have, key=key)
    beside = {columns.tools or TOOLS} | ({columns.system or SYSTEM} if columns.messages else {columns.system})
    read = (columns.messages, *columns.prompts, columns.completion, *beside)
    return {name for name in read if name is not None}


def prompt_and_completion(row: dict[str, Any], columns: ColumnsConfig, *, tools: str) -> Conversation:
    asked = read_prompt(row, columns.prompts, columns)
    answer = row[str(columns.completion)]
    if answer in (None, ""):
        raise DataError(f"column {columns.completion!r} is empty")
    answered = [{"role": "assistant", "content": str(answer)}]
    if isinstance(answer, (list, dict)):
        answered = read_turns(answer, role="assistant", column=str(columns.completion))
    before = frozenset(number for number, message in enumerate(asked) if message["role"] == "assistant")
    chosen = frozenset(range(len(asked), len(asked) + len(answered)))  # the completion is what is trained
    return Conversation([*asked, *answered], read_tools(row.get(tools)), before, chosen)
