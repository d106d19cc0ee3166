"""What the journal's entries add up to: versions, aliases with their history, canaries, tags.

An entry is a JSON object with a `type`, and may have an author, a reason, and a link to the entry before (chain.py):

    publish   name, number, manifest              manifest: the SHA-256 of the version's manifest.json
    delete    name, number                        the number is never used again; aliases that stood on it go with it
    alias     name, alias, number, previous, op   op: promote | rollback
    canary    name, alias, number, percent, ...   percent 0 ends it, with a reason
    tag       name, number, add, remove
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ValidationError


@dataclass(frozen=True)
class CanaryLimits:
    """When an endpoint sends a canary's share back to the stable version by itself."""

    max_error_rate: float = 0.05  # above that of the stable version
    max_latency_ratio: float = 2.0  # of median times to the first token
    min_requests: int = 20  # of the canary, before it is judged


class Publish(BaseModel):
    type: Literal["publish"]
    name: str
    number: int
    manifest: str | None = None  # of before 0.2


class Delete(BaseModel):
    type: Literal["delete"]
    name: str
    number: int


class Alias(BaseModel):
    type: Literal["alias"]
    name: str
    alias: str
    number: int
    op: str = "promote"


class CanaryMove(BaseModel):
    type: Literal["canary"]
    name: str
    alias: str
    number: int
    percent: float
    max_error_rate: float = CanaryLimits.max_error_rate
    max_latency_ratio: float = CanaryLimits.max_latency_ratio
    min_requests: int = CanaryLimits.min_requests


class Tag(BaseModel):
    type: Literal["tag"]
    name: str
    number: int
    add: list[str]
    remove: list[str]


@dataclass(frozen=True)
class Canary:
    number: int
    percent: float  # of the requests for the alias
    limits: CanaryLimits
    seq: int  # of the entry that made it so


@dataclass
class Journal:
    """What the journal says up to `last_seq`."""

    last_seq: int = 0
    versions: dict[str, list[int]] = field(default_factory=dict)
    deleted: set[tuple[str, int]] = field(default_factory=set)
    aliases: dict[tuple[str, str], int] = field(default_factory=dict)
    canaries: dict[tuple[str, str], Canary] = field(default_factory=dict)
    tags: dict[tuple[str, int], list[str]] = field(default_factory=dict)
    manifests: dict[tuple[str, int], str] = field(default_factory=dict)  # their digests, where they are known
    entries: list[dict[str, Any]] = field(default_factory=list)
    _stacks: dict[tuple[str, str], list[int]] = field(default_factory=dict)  # what rollback goes back through

    def apply(self, seq: int, entry: dict[str, Any]) -> None:
        """Whole or not at all. Raises `ValueError`: another shape, or a version that is not there."""
        if entry["type"] in TYPES:  # another type is a later ftray's: kept in the history, means nothing here
            shape, handle = TYPES[entry["type"]]
            try:
                read = shape.model_validate(entry)
            except ValidationError as error:
                first = error.errors()[0]
                raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
            known = self.has(read.name, read.number)
            if known == isinstance(read, Publish) and not isinstance(read, Tag):  # its version may be deleted meanwhile
                raise ValueError(
                    f"{read.type} of {read.name}@{read.number}, which is {'there' if known else 'not there'}"
                )
            handle(self, seq, read)
        self.entries.append({"seq": seq, **entry})
        self.last_seq = seq

    def has(self, name: str, number: int) -> bool:
        return number in self.versions.get(name, [])

    def before(self, name: str, alias: str) -> int | None:
        """The version that a rollback would go to."""
        earlier = self._stacks.get((name, alias), [])[:-1]
        return next((number for number in reversed(earlier) if self.has(name, number)), None)

    def uses_of(self, name: str, number: int) -> list[str]:
        """Aliases and canaries that stand on a version."""
        aliases = [f"{name}@{a}" for (owner, a), n in self.aliases.items() if (owner, n) == (name, number)]
        canaries = [
            f"the canary of {name}@{a}"
            for (owner, a), c in self.canaries.items()
            if (owner, c.number) == (name, number)
        ]
        return sorted(aliases) + sorted(canaries)

    def _publish(self, _: int, entry: Publish) -> None:
        self.versions.setdefault(entry.name, []).append(entry.number)
        if entry.manifest is not None:
            self.manifests[entry.name, entry.number] = entry.manifest

    def _delete(self, _: int, entry: Delete) -> None:
        self.versions[entry.name].remove(entry.number)
        self.deleted.add((entry.name, entry.number))
        gone = entry.name, entry.number
        self.aliases = {key: number for key, number in self.aliases.items() if (key[0], number) != gone}
        self.canaries = {
            key: canary
            for key, canary in self.canaries.items()
            if key in self.aliases and (key[0], canary.number) != gone
        }

    def _alias(self, _: int, entry: Alias) -> None:
        key = entry.name, entry.alias
        stack = self._stacks.setdefault(key, [])
        if entry.op == "rollback":
            while stack and stack[-1] != entry.number:
                stack.pop()
        elif not stack or stack[-1] != entry.number:
            stack.append(entry.number)
        self.aliases[key] = entry.number
        self.canaries.pop(key, None)  # it was to be compared with the version before

    def _canary(self, seq: int, entry: CanaryMove) -> None:
        key = entry.name, entry.alias
        if entry.percent == 0:
            self.canaries.pop(key, None)
        else:
            limits = CanaryLimits(entry.max_error_rate, entry.max_latency_ratio, entry.min_requests)
            self.canaries[key] = Canary(entry.number, entry.percent, limits, seq)

    def _tag(self, _: int, entry: Tag) -> None:
        key = entry.name, entry.number
        kept = [tag for tag in self.tags.get(key, []) if tag not in entry.remove]
        self.tags[key] = sorted({*kept, *entry.add})


TYPES: dict[str, tuple[type[Publish | Delete | Alias | CanaryMove | Tag], Callable[[Journal, int, Any], None]]] = {
    "publish": (Publish, Journal._publish),
    "delete": (Delete, Journal._delete),
    "alias": (Alias, Journal._alias),
    "canary": (CanaryMove, Journal._canary),
    "tag": (Tag, Journal._tag),
}
