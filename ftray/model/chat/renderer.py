"""One chat renderer for training and serving, so that the prompts of both are the same token ids.

A conversation is walked turn by turn. Before each assistant turn stands exactly the prompt that serving gives there;
where the template goes on from the turn before, both are one sequence, and where it rewrites what it has rendered (it
drops earlier thoughts, say), a new sequence begins. The text is cut where an assistant turn starts and where it ends,
and each piece is tokenised alone: a served prompt ends at such a cut, so its ids are a prefix of the training ids by
construction.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ftray.errors import DataError
from ftray.model.chat.control_tokens import ControlTokens
from ftray.model.chat.messages import THOUGHT_KEYS, Message
from ftray.model.chat.template import CLOSED, OPENED, Template, leaves_thought_open

# Of pieces of text, the token ids are remembered: of so many, each of so many characters at most.
MAX_PIECES, SHORT_PIECE = 10_000, 1_000
NO_ANSWER = "the conversation has no assistant turn"


@dataclass(frozen=True)
class Rendered:
    ids: np.ndarray  # int32, [T]
    trained: np.ndarray  # bool, [T]: tokens of assistant turns, each turn's end token included


@dataclass
class Passage:
    """Text in pieces: (text, number of the assistant turn that it is, or None)."""

    pieces: list[tuple[str, int | None]] = field(default_factory=list)
    text: str = ""

    def add(self, text: str, turn: int | None) -> None:
        self.text += text
        if text:
            self.pieces.append((text, turn))


class ChatRenderer:
    def __init__(self, tokenizer: Any, *, remembers: bool = True):
        """`remembers`: the token ids of short pieces, which recur in the rows of a data set."""
        self.tokenizer = tokenizer
        self._remembers = remembers
        self._pieces: dict[str, list[int]] = {}
        self._prepare()

    def _prepare(self) -> None:
        self._control = ControlTokens(self.tokenizer)
        self._template = Template(self.tokenizer, self._control)
        self.stop_ids = stop_token_ids(self.tokenizer, self._template)

    @property
    def control_ids(self) -> frozenset[int]:
        """Of the tokens that no message's text becomes."""
        return self._control.ids

    @property
    def template(self) -> Template:
        if self.tokenizer.chat_template is not self._template.source:  # another one was set
            self._prepare()
        if self._template.source is None:
            raise DataError("base_model: its tokenizer has no chat template, so chat messages cannot be rendered")
        return self._template

    def check_template(self) -> None:
        """Raises `DataError` where there is none."""
        _ = self.template

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """The prompt that asks for the next assistant turn. `tools`: OpenAI's function tools, rendered as the template
        does, or else in text (`tool_prompt.py`)."""
        template = self.template
        try:
            read, given = template.readable(messages, tools, drops_thoughts=True)
            prompt = template.render(read, ask=True, tools=given)
        except DataError:
            if not any(message.get("tool_calls") for message in messages):
                raise
            # A call whose arguments a model has broken, say: no template has words for it.
            read, given = template.readable(messages, tools, drops_thoughts=True, tells_calls_as_text=True)
            prompt = template.render(read, ask=True, tools=given)
        sequence = self._walk(template, read, given, is_lenient=True)[0][-1]
        if not prompt.startswith(sequence.text):
            sequence = Passage()
        sequence.add(prompt[len(sequence.text) :], None)
        return [token for text, _ in sequence.pieces for token in self._encode(text)]

    def training_examples(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] = (),
        *,
        is_trained: Callable[[int], bool] = lambda turn: True,
        trains_thoughts: bool = True,
    ) -> list[Rendered]:
        """Sequences in which each assistant turn stands once behind the prompt that asks for it. `is_trained`: by the
        number of its message. Those that have nothing trained are left out.

        Raises `DataError` where no token is trained, or in a sequence all are.
        """
        template = self.template
        read, given = template.readable(messages, tools)
        if not read:
            raise DataError("the conversation has no turn")
        shift = len(read) - len(messages)  # tools that are told as text may have a system turn of their own
        sequences, whole = self._walk(template, read, given)
        if read[-1]["role"] != "assistant":
            whole = template.render(read, ask=False, tools=given)
        if whole.startswith(sequences[-1].text):  # turns behind the last answer, and line breaks
            sequences[-1].add(whole[len(sequences[-1].text) :], None)
        check_nothing_is_left_out(read, sequences, shift=shift)
        untrained = {} if trains_thoughts else {i: thought_of(message) for i, message in enumerate(read)}
        found = [
            self._encoded(sequence, lambda turn: is_trained(turn - shift), thoughts=untrained) for sequence in sequences
        ]
        examples = [example for example in found if example.trained.any()]
        if not examples:
            has_answer = any(message["role"] == "assistant" for message in read)
            raise DataError(f"no trained token: {'no answer is to be trained' if has_answer else NO_ANSWER}")
        if any(example.trained.all() for example in examples):
            raise DataError("every token is trained: the template marks no prompt")
        return examples

    def training_ids(self, messages: Sequence[Message], *, train_from: int = 0) -> Rendered:
        """The one sequence of the assistant turns from message number `train_from` on. Raises `DataError` where the
        template needs several."""
        examples = self.training_examples(messages, is_trained=lambda turn: turn >= train_from)
        if len(examples) > 1:
            raise DataError(
                "the chat template rewrites earlier turns, so each answer has a sequence of its own; give one answer"
            )
        return examples[0]

    def _walk(
        self, template: Template, messages: Sequence[Message], tools: Sequence[Any], *, is_lenient: bool = False
    ) -> tuple[list[Passage], str]:
        """(at least one sequence, the text up to the last answer as the template renders it). Where `is_lenient`, turns
        that no prompt asks for are passed over: in a history that somebody serves they need not be trained."""
        sequences, whole = [Passage()], ""
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            try:
                if index == 0:
                    raise DataError("the conversation begins with an answer; put the turn that asks for it before")
                prompt = template.render(messages[:index], ask=True, tools=tools)
                whole = template.render(messages[: index + 1], ask=False, tools=tools)
                turn = turn_behind(template, prompt, whole, message, system=system_of(messages))
            except DataError:
                if not is_lenient:
                    raise
                sequences.append(Passage())
                continue
            if not prompt.startswith(sequences[-1].text):
                sequences.append(Passage())
            sequences[-1].add(prompt[len(sequences[-1].text) :], None)
            sequences[-1].add(turn, index)
        return sequences, whole

    def _encoded(self, sequence: Passage, is_trained: Callable[[int], bool], *, thoughts: dict[int, str]) -> Rendered:
        """`thoughts`: that are not trained, by turn."""
        ids: list[int] = []
        trained: list[bool] = []
        for text, turn in sequence.pieces:
            piece = self._encode(text)
            left_out = self._thought_tokens(text, piece) if turn is not None and thoughts.get(turn) else 0
            ids += piece
            trained += [False] * left_out
            trained += [turn is not None and is_trained(turn)] * (len(piece) - left_out)
        return Rendered(np.asarray(ids, np.int32), np.asarray(trained, bool))

    def _thought_tokens(self, turn: str, ids: Sequence[int]) -> int:
        """How many of a turn's tokens are its thought, the mark that closes it included."""
        frame = self.template.thought_frame
        thought, found, _ = turn.partition(frame.closing if frame is not None else CLOSED)
        if not found:
            return 0
        alone = self._encode(thought + found)
        return next((at for at, (a, b) in enumerate(zip(alone, ids, strict=False)) if a != b), len(alone))

    def _encode(self, text: str) -> list[int]:
        """Prompt heads and labels recur in every row: remember short pieces."""
        ids = self._pieces.get(text)
        if ids is None:
            try:
                ids = self._control.encode(text)
            except (TypeError, UnicodeEncodeError):
                raise DataError("a message is no Unicode text: it has half of a character (a lone surrogate)") from None
            if self._remembers and len(text) <= SHORT_PIECE and len(self._pieces) < MAX_PIECES:
                self._pieces[text] = ids
        return ids


def check_nothing_is_left_out(messages: Sequence[Message], sequences: Sequence[Passage], *, shift: int) -> None:
    """Raises `DataError` for a message whose words the template has left out, or has none."""
    answers = {turn: text for sequence in sequences for text, turn in sequence.pieces if turn is not None}
    whole = "\n".join(sequence.text for sequence in sequences)
    for index, message in enumerate(messages):
        words = message["content"]
        words = words if isinstance(words, str) else words[0]["text"]
        if message["role"] == "assistant" and not words.strip() and not message.get("tool_calls"):
            raise DataError(f"message {index - shift}: the answer is empty")
        text = answers.get(index, whole)
        for part in (words, thought_of(message)):
            if part.strip() not in text and json.dumps(part.strip(), ensure_ascii=False)[1:-1] not in text:
                raise DataError(f"message {index - shift}: the chat template leaves out {part.strip()[:40]!r}")


def turn_behind(template: Template, prompt: str, whole: str, message: Message, *, system: str) -> str:
    """What the model is to write behind the prompt, with the turn's end. `whole`: with the turn, as it is rendered.
    `system`: the system's words, which some templates tell in the last question alone (Mistral's)."""
    if whole.startswith(prompt):
        turn = whole[len(prompt) :]
    else:
        without = without_words(prompt, whole, system)
        turn = whole[len(without) :] if without else answer_behind(prompt, whole, thought_of(message))
    if template.ending_by_next:
        return turn + template.ending_by_next.get("tool" if message.get("tool_calls") else "user", "")
    return turn[: template.end_of(turn)]


def system_of(messages: Sequence[Message]) -> str:
    content = messages[0]["content"] if messages[0]["role"] == "system" else ""
    return content if isinstance(content, str) else content[0]["text"]


def without_words(prompt: str, whole: str, words: str) -> str | None:
    """The prompt without `words`, and white space around them, where `whole` begins so."""
    place = prompt.rfind(words.strip()) if words.strip() else -1
    if place < 0:
        return None
    behind = place + len(words.strip())
    rests = (prompt[behind:], prompt[behind:].lstrip())
    heads = (prompt[:place], prompt[:place].rstrip())
    return next((head + rest for head in heads for rest in rests if whole.startswith(head + rest)), None)


def thought_of(message: Message) -> str:
    return next((message[key] for key in THOUGHT_KEYS if message.get(key)), "")


def answer_behind(prompt: str, whole: str, thought: str) -> str:
    """What closes the thought that the prompt opens, and the answer, where the template renders neither behind it.
    Raises `DataError` where they differ in something else."""
    before = prompt[: prompt.rfind(OPENED)] if leaves_thought_open(prompt) else None
    if before is None or not whole.startswith(before):
        raise DataError(
            f"the chat template asks for an answer with {prompt[-40:]!r}, and renders this turn otherwise; where it "
            "asks for no thought, the turn must have none"
        )
    turn = whole[len(before) :]
    if turn.startswith(OPENED):  # in both; white space behind it differs
        return turn.removeprefix(OPENED)
    return f"{thought}\n{CLOSED}\n\n{turn}"


def stop_token_ids(tokenizer: Any, template: Template | None = None) -> set[int]:
    """End of text, and the tokens by which the tokenizer's chat template closes a turn."""
    stops = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
    vocabulary = tokenizer.get_vocab()
    known = {"<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>", "<|eom_id|>"}
    if tokenizer.chat_template is not None:
        template = template or Template(tokenizer, ControlTokens(tokenizer))
        frame = template.thought_frame
        within = f"{frame.opening}{frame.closing}{frame.bare}" if frame is not None else ""  # as gpt-oss' <|end|>
        known = {token for token in known if token not in within} | template.stop_tokens
    return stops | {vocabulary[token] for token in known if token in vocabulary}
