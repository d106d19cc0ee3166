"""Control tokens that somebody writes into a message are text, not control: a user, a web page or a tool cannot open
a turn of their own (what OWASP calls prompt injection, where it is done with the template's own marks).

Before the template is applied, each control token in the messages' texts gives way to a mark of plain letters, which
a template passes through as it does any word. Where the rendered text is tokenised, the stretch between two of the
template's own control tokens that holds such a mark has its text put back and is tokenised as text alone.
"""

import copy
import re
import threading
from collections.abc import Sequence
from functools import cached_property
from typing import Any

# Letters and digits alone: JSON, repr and `trim` leave them as they are.
OPEN, CLOSE = "Zq7controlx", "xZq7"
MARK = re.compile(OPEN + r"(\d+)" + CLOSE)
# What an assistant's turn holds as a text of its own, though some tokenizers have it as a control token.
THOUGHT = ("<think>", "</think>")


class ControlTokens:
    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        special = {str(token) for token in added if token.special} | set(map(str, tokenizer.all_special_tokens))
        self._tokens = sorted(filter(str.strip, special), key=lambda token: (-len(token), token))
        self._hidden = [*self._tokens, OPEN]  # a text that holds the mark itself is that text too
        self._number = {token: number for number, token in enumerate(self._hidden)}
        self._in_text = re.compile("|".join(map(re.escape, self._hidden)))
        self._of_template = re.compile(f"({'|'.join(map(re.escape, self._tokens)) or '(?!)'})")
        self._lock = threading.Lock()

    def hide(self, value: Any, *, keep: Sequence[str] = ()) -> Any:
        """`value` (a text, or lists and dicts of them) with a mark for each control token but those of `keep`."""
        if isinstance(value, str):
            return self._in_text.sub(lambda found: self._mark(found[0], keep), value)
        if isinstance(value, dict):
            return {self.hide(key): self.hide(item, keep=keep) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.hide(item, keep=keep) for item in value]
        return value

    def hide_in_messages(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        return [self.hide(m, keep=THOUGHT if m.get("role") == "assistant" else ()) for m in messages]

    def _mark(self, token: str, keep: Sequence[str]) -> str:
        return token if token in keep else f"{OPEN}{self._number[token]}{CLOSE}"

    def encode(self, rendered: str) -> list[int]:
        """Token ids of a text that the template has made of hidden values."""
        if OPEN not in rendered:
            return self._of_clean(rendered)
        ids: list[int] = []
        clean = ""  # what comes before this part and is not encoded yet
        for part in self._of_template.split(rendered):  # the template's control tokens are parts as well
            if OPEN not in part:
                clean += part
                continue
            text = MARK.sub(lambda mark: self._hidden[int(mark[1])], part)
            ids += self._of_clean(clean)
            with self._lock:  # a tokenizer is told in its state how to read
                ids += self._as_text(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            clean = ""
        return ids + self._of_clean(clean)

    def _of_clean(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    @cached_property
    def _as_text(self) -> Any:
        """One of its own: the other is used by other threads meanwhile."""
        tokenizer = copy.deepcopy(self._tokenizer)
        tokenizer.split_special_tokens = True
        return tokenizer
