"""Control tokens that somebody writes into a message are text, not control: a user, a web page or a tool cannot open
a turn of their own (what OWASP calls prompt injection, where it is done with the template's own marks).

Before the template is applied, each control token in the messages' texts gives way to a mark of plain letters, which
a template passes through as it does any word. Where the rendered text is tokenised, the span between two of the
template's own control tokens that holds such a mark has its text put back and is tokenised as text alone.
"""

import json
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from ftray.errors import DataError

# Letters and digits alone: JSON, repr and `trim` leave them as they are.
OPEN, CLOSE = "Zq7controlx", "xZq7"
MARK = re.compile(OPEN + r"(\d+)" + CLOSE)
# Parts of a turn that some tokenizers have as a token, special or not.
PARTS_OF_TURNS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
# What an assistant's turn may begin with; read as its thought, or shown as it is.
THOUGHT = re.compile(r"(\s*<think>)(.*?)(</think>)(.*)", re.DOTALL)


class ControlTokens:
    """All special tokens, and of the other added ones those that the chat template writes: among them may be ordinary
    words (Gemma has HTML's tags)."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        template = tokenizer.chat_template
        written = template if isinstance(template, str) else json.dumps(template or "", ensure_ascii=False)
        added = [(str(token), token.special) for token in getattr(tokenizer, "added_tokens_decoder", {}).values()]
        known = {text for text, is_special in added if is_special or text in PARTS_OF_TURNS or text in written}
        known |= set(map(str, tokenizer.all_special_tokens))
        self._tokens = sorted(filter(str.strip, known), key=lambda token: (-len(token), token))
        self._hidden = [*self._tokens, OPEN]  # a text that holds the mark itself is that text too
        self._number = {token: number for number, token in enumerate(self._hidden)}
        self._in_text = re.compile("|".join(map(re.escape, self._hidden)))
        self.pattern = f"(?:{'|'.join(map(re.escape, self._tokens)) or '(?!)'})"  # of a regular expression: any one
        self._of_template = re.compile(f"({self.pattern})")

    def hide(self, value: Any) -> Any:
        """`value` (a text, or lists and dicts of them) with a mark for each control token."""
        if isinstance(value, str):
            return self._in_text.sub(lambda found: f"{OPEN}{self._number[found[0]]}{CLOSE}", value)
        if isinstance(value, dict):
            return {self.hide(key): self.hide(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.hide(item) for item in value]
        return value

    def hide_in_messages(self, messages: Sequence[dict[str, Any]], *, keeps_thought: bool) -> list[dict[str, Any]]:
        """`keeps_thought`: one at the beginning of an assistant's text keeps its two marks."""
        return [
            self._hide_in_turn(message) if keeps_thought and message.get("role") == "assistant" else self.hide(message)
            for message in messages
        ]

    def _hide_in_turn(self, message: dict[str, Any]) -> dict[str, Any]:
        found = THOUGHT.fullmatch(message["content"])
        if found is None:
            return self.hide(message)
        opened, thought, closed, answer = found.groups()
        return {**self.hide(message), "content": f"{opened}{self.hide(thought)}{closed}{self.hide(answer)}"}

    def encode(self, rendered: str) -> list[int]:
        """Token ids of a text that the template has made of hidden values."""
        if OPEN.lower() not in rendered.lower():
            return self._of_clean(rendered)
        if OPEN.lower() in MARK.sub("", rendered).lower():
            raise DataError("the chat template changes the words of messages, so control tokens in them cannot be told")
        ids: list[int] = []
        clean = ""  # what comes before this part and is not encoded yet
        for part in self._of_template.split(rendered):  # the template's control tokens are parts as well
            if OPEN not in part:
                clean += part
                continue
            ids += self._of_clean(clean)
            ids += self._of_text(MARK.sub(lambda mark: self._hidden[int(mark[1])], part))
            clean = ""
        return ids + self._of_clean(clean)

    def _of_clean(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    def _of_text(self, text: str) -> list[int]:
        """Without a control token, whatever the text says."""
        ids = self._encode_as_text(text)
        if self.ids.isdisjoint(ids):
            return ids
        # A vocabulary that has them as words of its own: each is cut in two, which is no token.
        pieces = self._in_text.sub(lambda found: f"{found[0][:1]}\0{found[0][1:]}", text).split("\0")
        return [token for piece in pieces if piece for token in self._encode_as_text(piece)]

    @cached_property
    def ids(self) -> frozenset[int]:
        return frozenset(self._tokenizer.convert_tokens_to_ids(self._tokens))

    @cached_property
    def _encode_as_text(self) -> Any:
        """By a tokenizer that has no added tokens. It has no state: any thread may use it."""
        if not self._tokenizer.is_fast:
            return lambda text: self._tokenizer.convert_tokens_to_ids(
                self._tokenizer.tokenize(text, split_special_tokens=True)
            )
        from tokenizers import Tokenizer

        described = json.loads(self._tokenizer.backend_tokenizer.to_str())
        kept = [token for token in described["added_tokens"] if token["content"] not in self._number]
        plain = Tokenizer.from_str(json.dumps(described | {"added_tokens": kept}))
        plain.no_truncation()
        plain.no_padding()
        return lambda text: plain.encode(text, add_special_tokens=False).ids
