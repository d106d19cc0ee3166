"""Answers that must match a JSON schema or a regular expression (llguidance: which tokens may come next)."""

import threading
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ftray.errors import RequestError, UserError
from ftray.infer.protocol import StructuredOutput
from ftray.infer.schema_problems import located

KEPT = 64  # grammars that were prepared and not asked for yet


class Grammars:
    """Of one tokenizer, for any thread: a large schema takes a second to compile, which need not be the second of the
    thread that decodes. The first one also makes the tokenizer's table, tenths of a second in which no thread runs.

    Each is for the requests of one job: their answers share a lexer, and what brings that to its limits ends them
    all."""

    def __init__(self, tokenizer: Any, *, vocab_size: int, stop_ids: set[int]):
        self._hf_tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._stop_ids = sorted(stop_ids)
        self._table: Any = None
        self._table_lock = threading.Lock()
        self._prepared: deque[Prepared] = deque(maxlen=KEPT)
        self._prepared_lock = threading.Lock()  # never held while something compiles

    def prepare(self, structure: StructuredOutput, num_requests: int) -> None:
        """For so many calls of `matcher` to come. Raises `UserError` when the schema or expression is not one."""
        prepared = Prepared(structure, self._compile(structure), num_requests)
        with self._prepared_lock:
            self._prepared.append(prepared)

    def matcher(self, structure: StructuredOutput) -> "GrammarMatcher":
        """The one that was prepared, or a new one. Raises `UserError` when the schema or expression is not one."""
        with self._prepared_lock:
            for prepared in self._prepared:
                if prepared.structure == structure:
                    prepared.num_requests -= 1
                    if prepared.num_requests:
                        return prepared.matcher.copy()
                    self._prepared.remove(prepared)
                    return prepared.matcher
        return self._compile(structure)

    def _tokenizer(self) -> Any:
        import llguidance.hf

        with self._table_lock:
            if self._table is None:
                try:
                    self._table = llguidance.hf.from_tokenizer(
                        self._hf_tokenizer, n_vocab=self._vocab_size, eos_token=self._stop_ids or None
                    )
                except ValueError as error:
                    raise UserError(f"response_format: this model's tokenizer cannot guide answers ({error})") from None
            return self._table

    def _compile(self, structure: StructuredOutput) -> "GrammarMatcher":
        table = self._tokenizer()
        matcher, problem = begun(table, structure)
        if matcher is None:
            label = structure.label
            if structure.kind == "json_schema":
                problem = located(structure, problem, lambda part: begun(table, part)[1])
            raise RequestError(f"{label}: {problem}", param=label.partition("[")[0])
        return GrammarMatcher(matcher)


def begun(table: Any, structure: StructuredOutput) -> tuple[Any, str]:
    """A matcher that has its first token before it; or None, and why there is none."""
    from llguidance import LLMatcher

    try:
        if structure.kind == "regex":
            grammar = LLMatcher.grammar_from_regex(structure.text)
        else:  # without white space, which a weak model goes on with for ever
            grammar = LLMatcher.grammar_from_json_schema(structure.text, overrides={"whitespace_flexible": False})
        matcher = LLMatcher(table, grammar)
        problem = matcher.get_error()
    except ValueError as error:
        return None, str(error).strip()
    if problem:
        return None, problem.strip()
    trial = matcher.deep_copy()
    trial.compute_bitmask()
    if trial.is_error():  # a reference to itself, say
        return None, "nothing can match it (does it refer to itself?), or it is beyond the parser's limits"
    return matcher, ""


@dataclass(eq=False)
class Prepared:
    structure: StructuredOutput
    matcher: "GrammarMatcher"
    num_requests: int  # that have not asked for it yet


class GrammarMatcher:
    def __init__(self, matcher: Any):
        self._matcher = matcher

    def copy(self) -> "GrammarMatcher":
        return GrammarMatcher(self._matcher.deep_copy())

    def mask(self, logits_V: Tensor) -> None:
        """Makes every token that may not come next impossible, in place."""
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
        allowed = torch.from_numpy(bits.astype(bool))
        size = min(len(allowed), len(logits_V))
        logits_V[:size].masked_fill_(~allowed[:size], float("-inf"))
        logits_V[size:] = float("-inf")

    def accept(self, token: int) -> None:
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)

    @property
    def has_failed(self) -> bool:
        """Over a limit of the parser's: from then on nothing but the end may come, wherever the text is."""
        return self._matcher.is_error()
