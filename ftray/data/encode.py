"""From what a format reads of a row to the token sequences of its examples, by the shape that the objective wants.

An example is what a step counts: one sequence of a conversation or document, the chosen and the rejected one of a pair.
A row gives one example, or, for a document that is split, several.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from ftray.config.data import DataConfig
from ftray.data.formats import Conversation, Pair
from ftray.model.chat import ChatRenderer, Rendered
from ftray.objectives import Shape, TrainedTurns

Example = list[Rendered]
Encoder = Callable[[Any], list[Example]]  # of a conversation, a document or a pair


def chat_encoder(data: DataConfig, renderer: ChatRenderer, turns: TrainedTurns) -> Encoder:
    """An example for each prompt that serving would give: one of all turns, where the template goes on from the turn
    before, else one of each answer."""
    renderer.check_template()

    def encode(talk: Conversation) -> list[Example]:
        trained = trained_answers(talk, turns)
        examples = renderer.training_examples(
            talk.messages, talk.tools, is_trained=trained.__contains__, trains_thoughts=turns.reasoning
        )
        return [[rendered] for rendered in examples]

    return encode


def trained_answers(talk: Conversation, turns: TrainedTurns) -> set[int]:
    """The numbers of their messages."""
    answers = answers_of(talk)
    if turns.on == "last":
        answers = answers[-1:]
    elif turns.on == "by_weight":
        answers = [turn for turn in answers if turn in talk.chosen]
    return set(answers) - talk.untrained


def answers_of(talk: Conversation) -> list[int]:
    return [number for number, message in enumerate(talk.messages) if message["role"] == "assistant"]


def pair_encoder(data: DataConfig, renderer: ChatRenderer, turns: TrainedTurns) -> Encoder:
    renderer.check_template()

    def encode(pair: Pair) -> list[Example]:
        answers = (pair.chosen, pair.rejected)
        return [[renderer.training_ids([*pair.prompt, *a], train_from=len(pair.prompt)) for a in answers]]

    return encode


def document_encoder(data: DataConfig, renderer: ChatRenderer, turns: TrainedTurns) -> Encoder:
    """The tokenizer's own special tokens, the text, and the end-of-text token: every token is trained."""
    tokenizer = renderer.tokenizer

    def encode(text: str) -> list[Example]:
        ids = tokenizer(text)["input_ids"]
        if ids[:2] == [tokenizer.bos_token_id] * 2:  # the text has it, and the tokenizer adds another
            ids = ids[1:]
        if tokenizer.eos_token_id is not None and (not ids or ids[-1] != tokenizer.eos_token_id):
            ids = [*ids, tokenizer.eos_token_id]
        whole = np.asarray(ids, np.int32)
        size = data.max_example_tokens
        if data.overlong != "split" or len(whole) <= size:
            return [[all_trained(whole)]]
        # Pieces overlap by one token, the first of each being there only to be predicted from: no target is lost.
        return [[all_trained(whole[start : start + size])] for start in range(0, len(whole) - 1, size - 1)]

    return encode


def all_trained(ids: np.ndarray) -> Rendered:
    return Rendered(ids, np.ones(len(ids), bool))


ENCODERS: dict[Shape, Callable[..., Encoder]] = {
    "conversation": chat_encoder,
    "document": document_encoder,
    "pair": pair_encoder,
}
