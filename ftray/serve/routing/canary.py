"""Canaries as an endpoint sees them: who is sent to one, how it does beside the stable version, when it is taken
back."""

import hashlib
import random
import statistics
from collections import deque
from dataclasses import dataclass, field

from ftray.registry import Canary

KEPT = 500  # latest answers of each side that are compared
# Of the stable version, before its latency or errors are compared with; fewer count as no errors and no latency.
MIN_STABLE = 5
# A first token that comes later by less harms nobody; medians are compared after every answer, and there is noise.
NOTICED_S = 0.05


def is_chosen(canary: Canary, *, alias: str, session: str | None) -> bool:
    """The same for every request of one session, on every ingress; those chosen at 10% are also chosen at 20%."""
    if session is None:
        share = random.random()
    else:
        digest = hashlib.blake2b(f"{alias}:{canary.number}:{session}".encode(), digest_size=8).digest()
        share = int.from_bytes(digest) / 2**64
    return share * 100 < canary.percent


@dataclass
class Side:
    failed: deque[bool] = field(default_factory=lambda: deque(maxlen=KEPT))
    first_token_s: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))

    @property
    def error_rate(self) -> float:
        return sum(self.failed) / len(self.failed) if self.failed else 0.0


class CanaryWatch:
    """The answers of one alias's canary, and those of its stable version meanwhile."""

    def __init__(self, canary: Canary):
        self.canary = canary
        self._sides = {True: Side(), False: Side()}  # by whether it is the canary's

    def note(self, *, is_canary: bool, failed: bool, first_token_s: float | None) -> None:
        side = self._sides[is_canary]
        side.failed.append(failed)
        if first_token_s is not None:
            side.first_token_s.append(first_token_s)

    def verdict(self) -> str | None:
        """Why the canary should go, if it should."""
        limits, tried, stable = self.canary.limits, self._sides[True], self._sides[False]
        if len(tried.failed) < limits.min_requests:
            return None
        usual = stable.error_rate if len(stable.failed) >= MIN_STABLE else 0.0
        if tried.error_rate > usual + limits.max_error_rate:
            return (
                f"{tried.error_rate:.0%} of {len(tried.failed)} answers failed, against {usual:.0%} of the stable "
                f"version's; the limit is {limits.max_error_rate:.0%} more"
            )
        if tried.first_token_s and len(stable.first_token_s) >= MIN_STABLE:
            ours, theirs = statistics.median(tried.first_token_s), statistics.median(stable.first_token_s)
            if ours > theirs * limits.max_latency_ratio and ours > theirs + NOTICED_S:
                return (
                    f"the first token took {ours * 1000:.0f} ms, against {theirs * 1000:.0f} ms of the stable version; "
                    f"the limit is {limits.max_latency_ratio:g} times"
                )
        return None
