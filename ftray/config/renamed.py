"""Keys and values of a run that have another name since a release. The old one is read for one release more; a file
that has it gets a line that says so, and runs that began with it go on."""

from typing import Any

KEYS = {"memory.compile": "compile"}
VALUES = {"objective.type": {"domain": "text"}}
UNTIL = "0.3"


class RenamedWarning(FutureWarning):
    pass


def with_new_names(tree: Any) -> Any:
    """A copy of a run's tree of sections; what is no such tree comes back as it is. Raises ValueError where it has both
    names: neither is dropped for the other."""
    if not isinstance(tree, dict):
        return tree
    tree = {key: dict(value) if isinstance(value, dict) else value for key, value in tree.items()}
    for old, new in KEYS.items():
        section, key = old.split(".")
        if isinstance(tree.get(section), dict) and key in tree[section]:
            if new in tree:
                raise ValueError(f"{old} is called {new} now, and both are given; leave {old} out")
            tree[new] = tree[section].pop(key)
    for path, names in VALUES.items():
        section, key = path.split(".")
        if isinstance(tree.get(section), dict) and isinstance(value := tree[section].get(key), str):
            tree[section][key] = names.get(value, value)
    return tree


def by_new_keys(settings: Any) -> Any:
    """Of a sweep's `space`: settings by the dotted key."""
    return {KEYS.get(key, key): value for key, value in settings.items()} if isinstance(settings, dict) else settings


def old_names(tree: dict[str, Any]) -> list[str]:
    """A line for each that a run's file, or settings by their dotted keys, still have."""

    def found(path: str) -> Any:
        section, key = path.split(".")
        return tree[section].get(key) if isinstance(tree.get(section), dict) else None

    lines = [f"{old} is called {new} now" for old, new in KEYS.items() if found(old) is not None or old in tree]
    for path, names in VALUES.items():
        lines += [f"{path}: {old} is called {new} now" for old, new in names.items() if found(path) == old]
    return [f"{line}; the old name is read until ftray {UNTIL}" for line in lines]
