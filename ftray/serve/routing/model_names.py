"""Model names: the base, `NAME@VERSION`, `NAME@ALIAS`, or `NAME` for `NAME@prod`."""

import difflib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from ftray.errors import FtrayError, NotFoundError, UserError
from ftray.registry import Canary, Registry, parse_reference
from ftray.registry.reference import Reference
from ftray.serve.routing.canary import CanaryWatch, is_chosen

log = logging.getLogger("ftray.serve")

MayUse = Callable[[str | None], bool]  # of an adapter's name or NAME@N; None: the base


def everything(_: str | None) -> bool:
    return True


@dataclass(frozen=True)
class ServedModel:
    id: str  # what the answer calls itself: the base, or the exact NAME@N
    adapter: str | None  # NAME@N
    alias: str | None = None  # NAME@ALIAS that was asked for
    canary: Canary | None = None  # that runs for the alias
    is_canary: bool = False
    is_drawn: bool = True  # the side was chance's, and nobody's choice
    stable: str | None = None  # where the canary's request goes if the canary cannot answer

    @property
    def fallback(self) -> "ServedModel":
        assert self.stable is not None
        return replace(self, id=self.stable, adapter=self.stable, is_canary=False)


class ModelNames:
    def __init__(self, base_model: str, registry: Registry):
        self.base_model = base_model
        self.registry = registry
        self._started = int(time.time())
        self._watches: dict[str, CanaryWatch] = {}  # by alias

    def resolve(self, name: str, *, session: str | None = None, may_use: MayUse = everything) -> ServedModel:
        """An alias is looked up once, here; from then on the request is bound to one version. `session`: what stays on
        one side of a canary. What a caller may not use is unknown to it."""
        model = self._resolve(name, session=session, may_use=may_use)
        if not may_use(model.adapter):
            raise self._unknown(name, "no adapter of that name", may_use)
        return model

    def _resolve(self, name: str, *, session: str | None, may_use: MayUse) -> ServedModel:
        if name == self.base_model:
            return ServedModel(name, None)
        try:
            wanted = parse_reference(name)
        except UserError as error:
            raise self._unknown(name, str(error), may_use) from None
        try:
            exact = str(self.registry.resolve(wanted))
        except NotFoundError:
            raise self._unknown(name, self._lacking(wanted, may_use), may_use) from None
        if wanted.alias is None:
            return ServedModel(exact, exact)
        alias = f"{wanted.name}@{wanted.alias}"
        canary = self.registry.known.canaries.get((wanted.name, wanted.alias))
        drawn = session is None
        if canary is not None and is_chosen(canary, alias=alias, session=session):
            tried = f"{wanted.name}@{canary.number}"
            return ServedModel(tried, tried, alias, canary, is_canary=True, is_drawn=drawn, stable=exact)
        return ServedModel(exact, exact, alias, canary, is_drawn=drawn)

    def note(self, model: ServedModel, *, failed: bool, first_token_s: float | None) -> None:
        """An answer for an alias with a canary; takes the canary back when it does badly. Answers of a session do not
        count: whoever chooses its name chooses its side, and could burden one of them."""
        if model.canary is None or model.alias is None or not model.is_drawn:
            return
        watch = self._watches.get(model.alias)
        if watch is None or watch.canary != model.canary:
            watch = self._watches[model.alias] = CanaryWatch(model.canary)
        watch.note(is_canary=model.is_canary, failed=failed, first_token_s=first_token_s)
        reason = watch.verdict()
        if reason is not None:
            name, _, alias = model.alias.partition("@")
            self._watches.pop(model.alias, None)  # another thread may have had the same verdict
            try:
                self.registry.end_canary(name, alias, reason=reason, seq=model.canary.seq)
            except (
                FtrayError
            ) as error:  # another ingress was first, or the store does not answer: the next answer tries
                log.warning("the canary of %s could not be taken back: %s", model.alias, error)
            else:
                log.warning("the canary %s@%s of %s is taken back: %s", name, model.canary.number, model.alias, reason)

    def _lacking(self, wanted: Reference, may_use: MayUse) -> str:
        """In words of our own: the registry's name its place, and what others have."""
        numbers = self.registry.versions(wanted.name) if may_use(wanted.name) else []
        if not numbers:
            return "no adapter of that name"
        if wanted.alias is not None:
            return f"{wanted.name} has {', '.join(self.registry.aliases(wanted.name)) or 'no'} as aliases"
        return f"{wanted.name} has the versions {', '.join(map(str, numbers[-10:]))}"

    def _unknown(self, name: str, reason: str, may_use: MayUse) -> NotFoundError:
        """Names what is near, of what the caller may use."""
        names = self.names(may_use)
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(names[:20])}"
        return NotFoundError(f"model {name!r} is not served here ({reason}); {hint}")

    def names(self, may_use: MayUse = everything) -> list[str]:
        """In one pass: there may be thousands."""
        journal = self.registry.refresh()
        aliases: dict[str, list[str]] = {}
        for name, alias in sorted(journal.aliases):
            aliases.setdefault(name, []).append(alias)
        found = [self.base_model]
        for name in sorted(filter(may_use, journal.versions)):
            own = aliases.get(name, [])
            found += [name] if "prod" in own else []
            found += [f"{name}@{alias}" for alias in own]
            found += [f"{name}@{number}" for number in sorted(journal.versions[name])]
        return found

    def listing(self, may_use: MayUse = everything) -> dict:
        return {"object": "list", "data": [self.entry(name) for name in self.names(may_use)]}

    def entry(self, name: str) -> dict:
        parent = {} if name == self.base_model else {"parent": self.base_model}
        return {"id": name, "object": "model", "created": self._started, "owned_by": "ftray", **parent}
