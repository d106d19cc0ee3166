"""What a run would train on, looked at before it trains: the first rows token by token, figures of the whole set."""

import hashlib
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ftray.config import RunConfig
from ftray.config.data import DataConfig, SourceConfig
from ftray.data.dataset import TokenizedDataset, open_dataset
from ftray.data.examples import examples_of
from ftray.data.formats import describe_ratings, recognised, unread_columns, with_ratings_read
from ftray.data.micro_batches import first_fit
from ftray.data.sets import TRAIN, is_held_out
from ftray.data.tally import Tally
from ftray.data.tokens import Source, tokenize
from ftray.errors import DataError
from ftray.model.chat import ChatRenderer
from ftray.objectives import objective_of, trained_turns

Kind = Literal["prompt", "control", "trained", "end", "cut"]
NO_LIMIT = 2**31 - 1
MOST_LISTED = 10
PACKED = 2_000  # examples, of which packing is tried
BINS = 12
CONTEXT = 8  # tokens, by which one is decoded as it stands


@dataclass(frozen=True)
class Token:
    text: str
    id: int
    kind: Kind


@dataclass(frozen=True)
class Shown:
    """One example: the row it comes from, and its sequences."""

    row: int
    sequences: list[list[Token]]


@dataclass(frozen=True)
class Inspection:
    key: str
    location: str
    name: str
    weight: float | None
    read_as: str
    unread: list[str]
    template: list[str]  # what the chat template does, in words
    rows: int
    examples: int
    tokens: int
    trained_tokens: int
    longest: int
    limit: int  # data.max_example_tokens
    over_limit: int  # examples
    histogram: list[tuple[int, int]]  # (tokens at most, examples)
    duplicates: int  # examples that an earlier one equals
    untrained_answers: int
    held_out: int  # examples that are kept for evaluation
    left_out: int  # rows, by data.transform
    bad: list[tuple[int, str]]  # the first rows that cannot be used
    num_bad: int
    packing: float  # tokens of a micro-batch that are filled, as a share
    shown: list[Shown]

    @property
    def trained_share(self) -> float:
        return self.trained_tokens / max(1, self.tokens)

    def as_object(self) -> dict[str, Any]:
        return asdict(self) | {"trained_share": self.trained_share}


def inspect_source(
    key: str,
    config: SourceConfig,
    run: RunConfig,
    renderer: ChatRenderer,
    *,
    show: int,
    on_rows: Callable[[int, int], None] = lambda count, total: None,
) -> Inspection:
    """`show`: so many of the first examples. `on_rows`: told of so many more rows, of so many in all. Raises
    `DataError` where nothing can be read."""
    shape = objective_of(run.objective).shape
    limit = run.data.max_example_tokens
    data = run.data.of(config).model_copy(
        update={"max_example_tokens": NO_LIMIT if run.data.overlong != "split" else limit}
    )
    source = Source(key, config, data, renderer.tokenizer, shape, trained_turns(run.objective))
    rows = source.rows()
    as_rated = with_ratings_read(data, rows, shape=shape, key=str(source))
    source = replace(source, data=as_rated)
    with tempfile.TemporaryDirectory(prefix="ftray-inspect-") as scratch:
        place = Path(scratch) / "tokens"
        tally = tokenize(
            source,
            rows,
            place,
            processes=None,
            cancelled=threading.Event(),
            refuse=refuse_where_nothing_is_left,
            on_rows=lambda count: on_rows(count, len(rows)),
        )
        dataset = open_dataset(place)
        return Inspection(
            key=key,
            location=config.path,
            name=config.label,
            weight=config.weight,
            read_as=recognised(data, rows, shape=shape) if as_rated is data else describe_ratings(rows),
            unread=unread_columns(as_rated, rows, shape=shape, key=str(source)),
            template=describe_template(renderer) if shape != "document" else [],
            held_out=num_held_out(dataset, run) if key.startswith(TRAIN) else 0,
            packing=packing(dataset, run.batch.tokens_per_micro_batch),
            shown=[shown(dataset, number, renderer, limit=limit) for number in range(min(show, len(dataset)))],
            **of_rows(tally),
            **of_examples(dataset, limit=limit),
        )


def of_rows(tally: Tally) -> dict[str, Any]:
    return {
        "rows": tally.num_rows,
        "untrained_answers": tally.num_untrained,
        "left_out": tally.num_left_out,
        "bad": tally.bad[:MOST_LISTED],
        "num_bad": len(tally.bad),
    }


def of_examples(dataset: TokenizedDataset, *, limit: int) -> dict[str, Any]:
    lengths = np.asarray(dataset.lengths)
    return {
        "examples": len(dataset),
        "tokens": int(lengths.sum()),
        "trained_tokens": int(dataset.trained_lengths.sum()),
        "longest": int(lengths.max()),
        "limit": limit,
        "over_limit": int((lengths > limit).sum()),
        "histogram": histogram(lengths),
        "duplicates": count_duplicates(dataset),
    }


def training_sources(found: Sequence[Inspection]) -> list[Inspection]:
    return [source for source in found if source.key.startswith(TRAIN)]


def refuse_where_nothing_is_left(tally: Tally, source: str, data: DataConfig) -> None:
    if tally.num_examples == 0:
        first = f"; row {tally.bad[0][0]}: {tally.bad[0][1]}" if tally.bad else ""
        raise DataError(f"{source}: of {tally.num_rows} rows none can be trained{first}")


def describe_template(renderer: ChatRenderer) -> list[str]:
    template = renderer.template
    ends = ", ".join(sorted({template.ending, *template.ending_by_next.values()} - {""}))
    thoughts = "has no place for thoughts"
    if template.thought_frame is not None:
        thoughts = "opens a thought in each prompt" if template.opens_thought else "has a place for thoughts"
    return [
        f"an answer ends with {ends}" if ends else "nothing ends an answer: a model trained on it may not stop",
        thoughts,
        "tools in its own words" if template.takes_tools else "tools as text (Hermes' words)",
    ]


def shown(dataset: TokenizedDataset, number: int, renderer: ChatRenderer, *, limit: int) -> Shown:
    sequences = []
    for ids, trained in dataset.sequences(number):
        pieces = token_texts(ids.tolist(), renderer.tokenizer)
        kinds: list[Kind] = [kind_of(place, ids, trained, renderer, limit=limit) for place in range(len(ids))]
        sequences.append([Token(pieces[at], int(ids[at]), kinds[at]) for at in range(len(ids))])
    return Shown(int(dataset.rows[number]), sequences)


def kind_of(place: int, ids: np.ndarray, trained: np.ndarray, renderer: ChatRenderer, *, limit: int) -> Kind:
    if place >= limit:
        return "cut"
    if trained[place]:
        is_last = place + 1 == len(ids) or not trained[place + 1]
        return "end" if is_last and int(ids[place]) in renderer.stop_ids else "trained"
    return "control" if int(ids[place]) in renderer.control_ids else "prompt"


def token_texts(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """Of each token; of several that are one character, the last has it."""
    pieces: list[str] = []
    done = 0  # ids whose text is in `pieces`
    for count in range(1, len(ids) + 1):
        first = max(0, done - CONTEXT)
        before, after = tokenizer.decode(ids[first:done]), tokenizer.decode(ids[first:count])
        if after.endswith("\ufffd") and count < len(ids) and count - done < CONTEXT:
            pieces.append("")
            continue
        pieces.append(after[len(before) :])
        done = count
    return pieces


def num_held_out(dataset: TokenizedDataset, run: RunConfig) -> int:
    return int(is_held_out(dataset.keys, run.data.held_out).sum()) if run.data.held_out is not None else 0


def histogram(lengths: np.ndarray) -> list[tuple[int, int]]:
    edges = np.unique(np.ceil(np.linspace(lengths.min() - 1, lengths.max(), BINS + 1)).astype(int))[1:]
    places = np.searchsorted(edges, lengths)
    counts = Counter(places.tolist())
    return [(int(edge), counts[place]) for place, edge in enumerate(edges)]


def count_duplicates(dataset: TokenizedDataset) -> int:
    seen: set[bytes] = set()
    for number in range(len(dataset)):
        digest = hashlib.blake2b(digest_size=16)
        for ids, trained in dataset.sequences(number):
            digest.update(ids.tobytes() + trained.tobytes())
        seen.add(digest.digest())
    return len(dataset) - len(seen)


def packing(dataset: TokenizedDataset, budget: int) -> float:
    """Of the first examples that fit, as a share of the micro-batches' room."""
    first = examples_of(dataset, range(min(len(dataset), PACKED)))
    batches = first_fit([example for example in first if example.length <= budget], budget)
    used = sum(example.length for batch in batches for example in batch)
    return used / max(1, len(batches) * budget)
