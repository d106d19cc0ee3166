"""What became of a source's rows, and what is refused of them."""

from dataclasses import dataclass, field

from ftray.config.data import DataConfig
from ftray.data.dataset import MOST_KEPT, RowCounts
from ftray.errors import DataError

MAX_LISTED = 5


@dataclass
class Tally:
    """What became of the rows of one part; problems as (row, text)."""

    num_rows: int = 0
    num_truncated: int = 0
    num_dropped: int = 0  # by data.overlong
    num_left_out: int = 0  # by data.transform
    num_untrained: int = 0  # answers
    num_examples: int = 0
    bad: list[tuple[int, str]] = field(default_factory=list)
    overlong: list[tuple[int, str]] = field(default_factory=list)

    @property
    def row_counts(self) -> RowCounts:
        return RowCounts(
            num_rows=self.num_rows,
            num_truncated=self.num_truncated,
            num_dropped=self.num_dropped + self.num_left_out,
            num_untrained=self.num_untrained,
            num_bad=len(self.bad),
            bad=tuple(f"row {number}: {text}" for number, text in self.bad[:MOST_KEPT]),
        )


def add(total: Tally, part: Tally, *, row_offset: int) -> None:
    total.num_rows += part.num_rows
    total.num_truncated += part.num_truncated
    total.num_dropped += part.num_dropped
    total.num_left_out += part.num_left_out
    total.num_untrained += part.num_untrained
    total.num_examples += part.num_examples
    total.bad += [(number + row_offset, text) for number, text in part.bad]
    total.overlong += [(number + row_offset, text) for number, text in part.overlong]


def refuse_problems(tally: Tally, source: str, data: DataConfig) -> None:
    """Raises one `DataError` that lists them."""
    limit = data.max_example_tokens
    share = f"of {tally.num_rows} rows"
    if data.bad_rows == "error":
        fix = "fix or remove them, or leave them out with data.bad_rows: skip"
        raise_listed(tally.bad, f"{source}: {len(tally.bad)} {share} cannot be trained", fix=fix)
    raise_listed(
        tally.overlong,
        f"{source}: {len(tally.overlong)} {share} are longer than data.max_example_tokens ({limit})",
        fix="raise it (with batch.tokens_per_micro_batch), or set data.overlong to truncate, drop or, for documents, "
        "split",
    )
    if tally.num_examples == 0:
        by_transform = f", {tally.num_left_out} were dropped by data.transform" if tally.num_left_out else ""
        bad = f", {len(tally.bad)} cannot be trained ({tally.bad[0][1]})" if tally.bad else ""
        too_long = f"{tally.num_dropped} are over data.max_example_tokens"
        raise DataError(f"{source}: no row is left: {too_long}{by_transform}{bad}")


def raise_listed(problems: list[tuple[int, str]], what: str, *, fix: str) -> None:
    if problems:
        shown = "\n".join(f"  - row {number}: {text}" for number, text in problems[:MAX_LISTED])
        more = f"\n  - and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
        raise DataError(f"{what}:\n{shown}{more}\n  {fix}")
