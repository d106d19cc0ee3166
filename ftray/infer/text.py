"""Token ids to text as they come, with stop strings. Never shows half a character or text a stop string may cut."""

from typing import Any

# Enough context for a tokenizer that joins or spaces tokens by what comes before.
CONTEXT_TOKENS = 8
MOST_BYTES = 8  # tokens that may be parts of one character


class TextStream:
    def __init__(self, tokenizer: Any, stop: tuple[str, ...], *, shows_control: bool = False):
        """`shows_control`: control tokens are text too."""
        self._tokenizer = tokenizer
        self._skips = not shows_control
        self._stop = stop
        self._stop_ids = control_ids(tokenizer, stop)
        self._ids: list[int] = []
        self._decoded = 0  # ids whose text is in `_pending` or was shown
        self._pending = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Returns the text that is certain now; sets `stopped` when a stop string was met (it is not shown)."""
        if token_id in self._stop_ids:
            shown, self.stopped = self.finish(), True
            return shown
        self._ids.append(token_id)
        first = max(0, self._decoded - CONTEXT_TOKENS)
        before = self._tokenizer.decode(self._ids[first : self._decoded], skip_special_tokens=self._skips)
        after = self._tokenizer.decode(self._ids[first:], skip_special_tokens=self._skips)
        is_cut = after.endswith("\ufffd")  # the bytes of a character are not all here
        if is_cut and len(self._ids) - self._decoded < MOST_BYTES:  # beyond, they are no character's
            return ""
        self._pending += after[len(before) :]
        self._decoded = len(self._ids)
        return self._release()

    def finish(self) -> str:
        """What was held back: shown when the answer ends without the stop string it might have become. Sets `stopped`
        when it has become one with the tokens of half a character behind it."""
        if self.stopped:
            return ""
        if self._decoded < len(self._ids):
            self._pending += self._tokenizer.decode(self._ids[self._decoded :], skip_special_tokens=self._skips)
            self._decoded = len(self._ids)
        return self._release() + self._pending

    def _release(self) -> str:
        found = [at for text in self._stop if (at := self._pending.find(text)) >= 0]
        if found:
            self.stopped = True
            shown = self._pending[: min(found)]
            self._pending = ""
            return shown
        held = max((overlap(self._pending, text) for text in self._stop), default=0)
        cut = len(self._pending) - held
        shown, self._pending = self._pending[:cut], self._pending[cut:]
        return shown


def control_ids(tokenizer: Any, texts: tuple[str, ...]) -> set[int]:
    """Of those texts that are control tokens: an answer's text never shows these."""
    if not texts:
        return set()
    known = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    return {known[text] for text in texts if text in known}


def overlap(text: str, stop: str) -> int:
    """Length of the longest ending of `text` that is a beginning of `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
