"""How many answers a replica takes on at a time, running or waiting."""

from collections import Counter

from ftray.serve.protocol import Failed

# One owner (a tenant; where callers are unknown, an adapter) leaves every fourth place to the others, however much is
# asked for.
LEFT_TO_OTHERS = 4


class Admission:
    def __init__(self, total: int):
        self.total = total
        self._taken: Counter[str] = Counter()  # by owner

    def refusal(self, owner: str, count: int) -> Failed | None:
        """Where there is no room for so many more."""
        most = self.total - self.total // LEFT_TO_OTHERS
        if count > most:
            takes = f"this endpoint takes at most {most} of one caller at a time"
            return Failed(f"the request asks for {count} answers; {takes}", 400)
        if self._taken.total() + count > self.total:
            return Failed("too many requests wait for this endpoint; try again", 429)
        if self._taken[owner] + count > most:
            return Failed(f"too many requests of {owner or 'the base'} wait for this endpoint; try again", 429)
        return None

    def take(self, owner: str, count: int) -> None:
        self._taken[owner] += count

    def give_back(self, owner: str, count: int) -> None:
        self._taken[owner] -= count
        if not self._taken[owner]:
            del self._taken[owner]
