"""One chat renderer for training and serving, so that the prompts of both are the same token ids.

The text is cut where an assistant turn starts and where it ends, and each piece is tokenised alone. A served
prompt ends exactly at such a cut, so its ids are a prefix of the training ids by construction. Control tokens in the
messages' own texts are text (`control_tokens.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ftray.errors import DataError
from ftray.model.control_tokens import ControlTokens
from ftray.model.tool_prompt import knows_tools, tools_in_text

ROLES = ("system", "user", "assistant", "tool")
# Of pieces of text, the token ids are remembered: of so many, each of so many characters at most.
MAX_PIECES, SHORT_PIECE = 10_000, 1_000
Message = dict[str, Any]


@dataclass(frozen=True)
class Rendered:
    ids: np.ndarray  # int32, [T]
    trained: np.ndarray  # bool, [T]: tokens of assistant turns, each turn's end-of-turn token included


class ChatRenderer:
    def __init__(self, tokenizer: Any, *, remembers: bool = True):
        """`remembers`: the token ids of short pieces, which recur in the rows of a data set."""
        self.tokenizer = tokenizer
        self._remembers = remembers
        self.stop_ids = stop_token_ids(tokenizer)
        self._control = ControlTokens(tokenizer)
        self._pieces: dict[str, list[int]] = {}

    def check_template(self) -> None:
        if self.tokenizer.chat_template is None:
            raise DataError("base_model: its tokenizer has no chat template, so chat messages cannot be rendered")

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """The prompt that asks for the next assistant turn. `tools`: OpenAI's function tools, told as the template
        tells them, or else in text (`tool_prompt.py`)."""
        self.check_template()
        messages, tools = self._control.hide_in_messages(messages), self._control.hide(list(tools))
        uses_tools = tools or any(message.get("tool_calls") for message in messages)
        if uses_tools and not knows_tools(self.tokenizer.chat_template):
            messages, tools = tools_in_text(messages, tools), ()
        ids: list[int] = []
        for text, _ in self._cut(messages, ask=True, tools=tools):
            ids += self._encode(text)
        return ids

    def training_ids(self, messages: Sequence[Message], *, train_from: int = 0) -> Rendered:
        """The whole conversation, with the tokens of assistant turns marked, from message number `train_from` on.

        Raises `DataError` when none, or all, are.
        """
        ids: list[int] = []
        trained: list[bool] = []
        for text, turn in self._cut(self._control.hide_in_messages(messages), ask=False):
            piece = self._encode(text)
            num_trained = self._answer_length(piece) if turn is not None and turn >= train_from else 0
            ids += piece
            trained += [True] * num_trained + [False] * (len(piece) - num_trained)
        if not any(trained):
            raise DataError("no trained token: the conversation has no assistant turn")
        if all(trained):
            raise DataError("every token is trained: the template marks no prompt")
        return Rendered(np.asarray(ids, np.int32), np.asarray(trained, bool))

    def _cut(
        self, messages: Sequence[Message], *, ask: bool, tools: Sequence[dict[str, Any]] = ()
    ) -> list[tuple[str, int | None]]:
        """[(text, number of the message that is this assistant turn, or None)], in order."""
        self.check_template()
        pieces: list[tuple[str, int | None]] = []
        done = ""
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._render(messages[:index], ask=True, tools=tools)
            full = self._render(messages[: index + 1], ask=False, tools=tools)
            if not (prompt.startswith(done) and full.startswith(prompt)):
                raise DataError(
                    "the chat template rewrites earlier turns, so training and serving would see different prompts; "
                    "use one assistant turn per conversation"
                )
            pieces += [(prompt[len(done) :], None), (full[len(prompt) :], index)]
            done = full
        rest = self._render(messages, ask=ask, tools=tools)
        if not rest.startswith(done):
            raise DataError("the chat template rewrites earlier turns; use one assistant turn per conversation")
        return [(text, turn) for text, turn in [*pieces, (rest[len(done) :], None)] if text]

    def _render(self, messages: Sequence[Message], *, ask: bool, tools: Sequence[dict[str, Any]]) -> str:
        given = {"tools": list(tools)} if tools else {}
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=ask, **given
            )
        except Exception as error:  # noqa: BLE001  a template is a program of others: what it raises, it refuses
            raise DataError(f"the chat template refuses this conversation: {error}") from None

    def _encode(self, text: str) -> list[int]:
        """Prompt heads and labels recur in every row: remember short pieces."""
        ids = self._pieces.get(text)
        if ids is None:
            ids = self._control.encode(text)
            if self._remembers and len(text) <= SHORT_PIECE and len(self._pieces) < MAX_PIECES:
                self._pieces[text] = ids
        return ids

    def _answer_length(self, piece: list[int]) -> int:
        """Up to and with the end-of-turn token; a template's line break after it is never generated."""
        return next((i + 1 for i, token in enumerate(piece) if token in self.stop_ids), len(piece))


def stop_token_ids(tokenizer: Any) -> set[int]:
    """End of text, and the end-of-turn tokens that common chat templates close a turn with."""
    stops = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
    vocabulary = tokenizer.get_vocab()
    known = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>", "<|eom_id|>")
    return stops | {vocabulary[token] for token in known if token in vocabulary}


def check_messages(messages: Any) -> list[Message]:
    """The messages as they are; raises `DataError` naming what is wrong with them."""
    if not isinstance(messages, list) or not messages:
        raise DataError("messages must be a non-empty list of {role, content}")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise DataError(f"message {index} must have `role` and `content`")
        if message["role"] not in ROLES:
            raise DataError(f"message {index}: role {message['role']!r} must be one of {', '.join(ROLES)}")
        if not isinstance(message["content"], str):
            raise DataError(f"message {index}: content must be text")
    return messages
