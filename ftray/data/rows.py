"""Raw rows as conversations, documents or preference pairs, by the columns the config names or, without it, by those
the data has."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ftray.config.data import ColumnsConfig
from ftray.errors import DataError
from ftray.model.chat import Message, check_messages

SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "user": "user",
    "assistant": "assistant",
}


@dataclass(frozen=True)
class Pair:
    """Two answers to one conversation, the preferred one first."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]


def row_reader(columns: ColumnsConfig | None, have: Sequence[str], *, key: str) -> Callable[[dict], list[Message]]:
    """Conversations. Chooses the mapping once for the whole set; raises `DataError` when a column is not there."""
    if columns is None:
        columns = guess_conversation(have, key=key)
    check_columns(columns, have, key=key)
    if columns.messages is not None:
        column = columns.messages
        return lambda row: read_messages(row[column])
    if columns.prompt is None or columns.completion is None:
        raise DataError(f"{key}: data.columns names no conversation; give `messages`, or `prompt` and `completion`")
    return lambda row: prompt_and_completion(row, columns)


def text_reader(columns: ColumnsConfig | None, have: Sequence[str], *, key: str) -> Callable[[dict], str]:
    """Documents, for `objective.type: domain`."""
    column = columns.text if columns is not None else "text"
    if column is None or column not in have:
        raise DataError(
            f"{key}: objective domain trains on a text column; the data has {', '.join(have)}. "
            f"Example: data.columns: {{text: {have[0]}}}"
        )

    def read(row: dict) -> str:
        if not isinstance(row[column], str) or not row[column].strip():
            raise DataError(f"column {column!r} is empty or no text")
        return row[column]

    return read


def pair_reader(columns: ColumnsConfig | None, have: Sequence[str], *, key: str) -> Callable[[dict], Pair]:
    """Preference pairs: `chosen` and `rejected` beside a prompt (text or messages), or as whole conversations that
    begin alike."""
    if columns is None:
        columns = guess_pair(have, key=key)
    check_columns(columns, have, key=key)
    if columns.chosen is None or columns.rejected is None:
        raise DataError(f"{key}: a preference objective needs data.columns.chosen and data.columns.rejected")
    chosen, rejected, prompt = columns.chosen, columns.rejected, columns.messages or columns.prompt

    def read(row: dict) -> Pair:
        answers = [read_turns(row[column], role="assistant", column=column) for column in (chosen, rejected)]
        if prompt is not None:
            names = [prompt] if isinstance(prompt, str) else list(prompt)
            asked = read_prompt(row, names, columns)
        else:
            asked, answers = split_common_start(*answers)
        if answers[0] == answers[1]:
            raise DataError("chosen and rejected are the same")
        for column, answer in zip((chosen, rejected), answers, strict=True):
            if not answer or answer[0]["role"] != "assistant":
                raise DataError(f"column {column!r}: has no assistant turn after the prompt")
        return Pair(asked, *answers)

    return read


# -- which columns ------------------------------------------------------------------------------------------------


def check_columns(columns: ColumnsConfig, have: Sequence[str], *, key: str) -> None:
    prompt = [columns.prompt] if isinstance(columns.prompt, str) else columns.prompt or []
    named = [columns.messages, *prompt, columns.completion, columns.system, columns.chosen, columns.rejected]
    missing = [name for name in named if name is not None and name not in have]
    if missing:
        raise DataError(f"{key}: no column {missing[0]!r}; the data has {', '.join(have)}; see data.columns")


def guess_conversation(have: Sequence[str], *, key: str) -> ColumnsConfig:
    for name in ("messages", "conversations"):
        if name in have:
            return ColumnsConfig(messages=name)
    if "prompt" in have and "completion" in have:
        return ColumnsConfig(prompt="prompt", completion="completion")
    raise DataError(
        f"{key}: the columns are {', '.join(have)}; without data.columns a row needs `messages`, or `prompt` and "
        "`completion`. Example: data.columns: {prompt: " + have[0] + ", completion: " + have[-1] + "}"
    )


def guess_pair(have: Sequence[str], *, key: str) -> ColumnsConfig:
    if "chosen" not in have or "rejected" not in have:
        raise DataError(
            f"{key}: the columns are {', '.join(have)}; without data.columns a pair needs `chosen` and `rejected`, and "
            "`prompt`, `messages` or `conversations` before them"
        )
    prompt = next((name for name in ("prompt", "messages", "conversations") if name in have), None)
    named = {"prompt": prompt} if prompt == "prompt" else {"messages": prompt}
    return ColumnsConfig(**named, chosen="chosen", rejected="rejected")


# -- what is in them ----------------------------------------------------------------------------------------------


def read_messages(value: Any) -> list[Message]:
    return check_messages([to_message(message) for message in value or []] if isinstance(value, list) else value)


def read_turns(value: Any, *, role: str, column: str) -> list[Message]:
    """A text is one turn of `role`; a message or a list of messages is itself."""
    if isinstance(value, str):
        if not value:
            raise DataError(f"column {column!r} is empty")
        return [{"role": role, "content": value}]
    return read_messages([value] if isinstance(value, dict) else value)


def read_prompt(row: dict[str, Any], names: Sequence[str], columns: ColumnsConfig) -> list[Message]:
    if len(names) == 1 and not isinstance(row[names[0]], str):
        turns = read_turns(row[names[0]], role="user", column=names[0])
    else:
        parts = [str(row[name]) for name in names if row[name] not in (None, "")]
        if not parts:
            raise DataError(f"column {names[0]!r} is empty")
        turns = [{"role": "user", "content": "\n\n".join(parts)}]
    if columns.system is not None and row[columns.system] not in (None, ""):
        turns = [{"role": "system", "content": str(row[columns.system])}, *turns]
    return turns


def prompt_and_completion(row: dict[str, Any], columns: ColumnsConfig) -> list[Message]:
    names = [columns.prompt] if isinstance(columns.prompt, str) else list(columns.prompt or [])
    asked = read_prompt(row, names, columns)
    answer = row[str(columns.completion)]
    if answer in (None, ""):
        raise DataError(f"column {columns.completion!r} is empty")
    if isinstance(answer, (list, dict)):
        return [*asked, *read_turns(answer, role="assistant", column=str(columns.completion))]
    return [*asked, {"role": "assistant", "content": str(answer)}]


def split_common_start(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], list[list[Message]]]:
    """Two whole conversations: the turns they share are the prompt."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == 0:
        raise DataError("chosen and rejected begin differently, so no prompt is to be seen; name one in data.columns")
    if shared in (len(chosen), len(rejected)) and chosen != rejected:
        raise DataError("one of chosen and rejected is the beginning of the other")
    return chosen[:shared], [chosen[shared:], rejected[shared:]]


def to_message(message: Any) -> Any:
    """`datasets` fills keys that only other rows have with None, and templates take a present key for a given one.
    ShareGPT's `from` and `value` become `role` and `content`."""
    if not isinstance(message, dict):
        return message
    given = {key: value for key, value in message.items() if value is not None}
    if "from" in given and "value" in given:
        return {"role": SHAREGPT_ROLES.get(given["from"], given["from"]), "content": given["value"]}
    return given
