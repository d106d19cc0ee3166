"""Preference pairs: two answers to one conversation."""

from collections.abc import Callable, Sequence

from ftray.config.data import ColumnsConfig
from ftray.data.formats.columns import check_columns
from ftray.data.formats.protocol import Pair
from ftray.data.formats.turns import read_prompt, read_turns
from ftray.errors import DataError
from ftray.model.chat import Message


def pair_reader(columns: ColumnsConfig | None, have: Sequence[str], *, key: str) -> Callable[[dict], Pair]:
    """Preference pairs: `chosen` and `rejected` beside a prompt (text or messages), or as whole conversations that
    begin alike."""
    if columns is None:
        columns = guess_pair(have, key=key)
    check_columns(columns, have, key=key)
    if columns.chosen is None or columns.rejected is None:
        raise DataError(f"{key}: a preference objective needs data.columns.chosen and data.columns.rejected")
    chosen, rejected = columns.chosen, columns.rejected
    prompt = [columns.messages] if columns.messages is not None else columns.prompts

    def read(row: dict) -> Pair:
        answers = [read_turns(row[column], role="assistant", column=column) for column in (chosen, rejected)]
        if prompt:
            asked = read_prompt(row, prompt, columns)
            answers = [answer[len(asked) :] if answer[: len(asked)] == asked else answer for answer in answers]
        else:
            asked, answers = split_common_start(*answers)
        if answers[0] == answers[1]:
            raise DataError("chosen and rejected are the same")
        for column, answer in zip((chosen, rejected), answers, strict=True):
            if not answer or answer[0]["role"] != "assistant":
                raise DataError(f"column {column!r}: has no assistant turn after the prompt")
        return Pair(asked, *answers)

    return read


def guess_pair(have: Sequence[str], *, key: str) -> ColumnsConfig:
    if "chosen" not in have or "rejected" not in have:
        raise DataError(
            f"{key}: the columns are {', '.join(have)}; without data.columns a pair needs `chosen` and `rejected`, and "
            "`prompt`, `messages` or `conversations` before them"
        )
    prompt = next((name for name in ("prompt", "messages", "conversations") if name in have), None)
    named = {"prompt": prompt} if prompt == "prompt" else {"messages": prompt}
    return ColumnsConfig(**named, chosen="chosen", rejected="rejected")


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
