"""How often each adapter is asked for: counts that halve every minute."""

import time
from collections.abc import Callable

HALF_LIFE_S = 60.0
FORGOTTEN = 0.01  # a count so small is dropped


class Traffic:
    def __init__(self, *, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._counts: dict[str, tuple[float, float]] = {}  # count and when it was so

    def note(self, key: str) -> None:
        self._counts[key] = self.count(key) + 1, self._clock()

    def count(self, key: str) -> float:
        count, at = self._counts.get(key, (0.0, 0.0))
        return count * 0.5 ** ((self._clock() - at) / HALF_LIFE_S)

    def hottest(self) -> list[str]:
        """Keys, the most asked for first."""
        for key in [key for key in self._counts if self.count(key) < FORGOTTEN]:
            del self._counts[key]
        return sorted(self._counts, key=self.count, reverse=True)
