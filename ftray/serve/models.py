"""Model names: the base, `NAME@VERSION`, `NAME@ALIAS`, or `NAME` for `NAME@prod`."""

import difflib
import time
from dataclasses import dataclass

from ftray.errors import NotFoundError, UserError
from ftray.registry import Registry


@dataclass(frozen=True)
class ServedModel:
    id: str  # what the answer calls itself: the base, or the exact NAME@N
    adapter: str | None  # NAME@N


class ModelNames:
    def __init__(self, base_model: str, registry: Registry):
        self.base_model = base_model
        self.registry = registry
        self._started = int(time.time())

    def resolve(self, name: str) -> ServedModel:
        """An alias is looked up once, here; from then on the request is bound to one version."""
        if name == self.base_model:
            return ServedModel(name, None)
        try:
            exact = str(self.registry.resolve(name))
        except UserError as error:
            near = difflib.get_close_matches(name, self.names(), n=3, cutoff=0.4)
            hint = f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(self.names()[:20])}"
            raise NotFoundError(f"model {name!r} is not served here ({error}); {hint}") from None
        return ServedModel(exact, exact)

    def names(self) -> list[str]:
        found = [self.base_model]
        for name in self.registry.names():
            aliases = self.registry.aliases(name)
            found += [name] if "prod" in aliases else []
            found += [f"{name}@{alias}" for alias in aliases]
            found += [f"{name}@{number}" for number in self.registry.versions(name)]
        return found

    def listing(self) -> dict:
        def entry(name: str) -> dict:
            parent = {} if name == self.base_model else {"parent": self.base_model}
            return {"id": name, "object": "model", "created": self._started, "owned_by": "ftray", **parent}

        return {"object": "list", "data": [entry(name) for name in self.names()]}
