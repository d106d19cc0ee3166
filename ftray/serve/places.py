"""How many answers a replica takes on at a time, running or waiting."""

from collections import Counter

# One tenant leaves every fourth place to the others, however much it asks for.
LEFT_TO_OTHERS = 4


class Places:
    def __init__(self, total: int):
        self.total = total
        self._taken: Counter[str] = Counter()  # by tenant

    def refusal(self, tenant: str, count: int) -> tuple[int, str] | None:
        """HTTP status and message, where there is no room for so many more."""
        if count > self.total:
            return 400, f"the request asks for {count} answers; this endpoint takes at most {self.total} at a time"
        if self._taken.total() + count > self.total:
            return 429, "too many requests wait for this endpoint; try again"
        if tenant and self._taken[tenant] + count > self.total - self.total // LEFT_TO_OTHERS and self._taken[tenant]:
            return 429, f"too many requests of {tenant} wait for this endpoint; try again"
        return None

    def take(self, tenant: str, count: int) -> None:
        self._taken[tenant] += count

    def give_back(self, tenant: str, count: int) -> None:
        self._taken[tenant] -= count
        if not self._taken[tenant]:
            del self._taken[tenant]
