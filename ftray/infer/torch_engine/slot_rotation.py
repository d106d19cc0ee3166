"""Which adapters give their slots up when another has long waited for one: each has its slot for a time, then it may be
somebody else's turn. The time begins with the first token drawn, so every turn brings at least one answer on, however
long its prompt takes to be computed again.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

# A slot is kept for so many steps in which tokens are drawn.
MIN_STEPS = 64


class SlotRotation:
    def __init__(self):
        self._drawing_since: dict[str, int] = {}  # by adapter, the step of its first token since it has its slot

    def drew(self, adapter: str, step: int) -> None:
        self._drawing_since.setdefault(adapter, step)

    def left(self, adapter: str) -> None:
        """None of its sequences runs any more."""
        self._drawing_since.pop(adapter, None)

    def givers(self, running: Iterable[Any], *, owner: str, step: int) -> list[str]:
        """Of the adapters of running sequences those that may have to go for another of `owner`: its own, and those of
        owners with more than it has (without its share of this one). Who has drawn for longest is first."""
        held = owners_of_adapters(running)
        num_held = Counter(user for users in held.values() for user in users)

        def gives(adapter: str) -> bool:
            has_drawn = step - self._drawing_since.get(adapter, step) >= MIN_STEPS
            others = num_held[owner] - (owner in held[adapter])
            return has_drawn and all(user == owner or num_held[user] > others for user in held[adapter])

        return sorted(filter(gives, held), key=lambda adapter: self._drawing_since[adapter])


def owners_of_adapters(running: Iterable[Any]) -> dict[str, set[str]]:
    """Of sequences: their adapters, and the owners that use each."""
    held: dict[str, set[str]] = {}
    for sequence in running:
        if sequence.request.adapter is not None:
            held.setdefault(sequence.request.adapter, set()).add(sequence.request.flow[0])
    return held
