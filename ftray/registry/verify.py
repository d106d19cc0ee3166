"""`ftray adapters verify`: everything a registry holds, looked at; and its journal made anew from what is there."""

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from ftray.errors import DamagedError
from ftray.registry.chain import Chain, entry_key, unlinked
from ftray.registry.journal import Journal
from ftray.registry.reader import VERSION, AdapterVersion, RegistryReader
from ftray.registry.registry import author
from ftray.storage import Manifest, ObjectStore
from ftray.storage.manifest import MANIFEST

ASIDE = "journal-before-"  # and the time; `UNFINISHED` in it until the new one is whole
UNFINISHED = "unfinished"
VERSION_MANIFEST = re.compile(rf"adapters/([^/]+)/versions/({VERSION.pattern})/{MANIFEST}")


@dataclass
class Findings:
    entries: int = 0
    versions: int = 0
    problems: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)  # versions


def verify_registry(location: str) -> Findings:
    """The journal's chain, and each version's manifest and files, byte for byte."""
    registry = RegistryReader(location)
    found = Findings()
    try:
        journal = registry.refresh()
    except DamagedError as error:
        found.problems.append(str(error))
        journal = registry.known
    found.entries = journal.last_seq
    for name, number in sorted((name, number) for name, numbers in journal.versions.items() for number in numbers):
        found.versions += 1
        try:
            registry.verify(registry.get(f"{name}@{number}"))
        except DamagedError as error:
            found.damaged.append(f"{name}@{number}")
            uses = journal.uses_of(name, number)
            standing = f" ({' and '.join(uses)} stand{'s' if len(uses) == 1 else ''} on it)" if uses else ""
            found.problems.append(f"{error}{standing}")
    for version in sorted(whole_versions(ObjectStore(location)), key=str):
        if not journal.has(version.name, version.number) and (version.name, version.number) not in journal.deleted:
            found.problems.append(
                f"{version}: is there, and the journal does not know of it: its publication was interrupted, it was "
                "copied here, or its entry was lost"
            )
    return found


def whole_versions(objects: ObjectStore) -> Iterator[AdapterVersion]:
    """Those that have a manifest, whatever the journal says."""
    for key in objects.keys("adapters"):
        if found := VERSION_MANIFEST.fullmatch(key):
            try:
                manifest = Manifest.model_validate_json(objects.read(key) or b"")
            except ValidationError:
                continue
            yield AdapterVersion(found[1], int(found[2]), manifest)


def rebuild_journal(location: str) -> Journal:
    """A new journal of every version that has a manifest. Aliases and tags stand as the old one says up to where it is
    damaged; the old one is kept beside it. Nothing else may write meanwhile; an endpoint that runs goes on with what it
    knew until it is started again. Interrupted, the same call goes on."""
    objects = ObjectStore(location)
    aside = next(iter(sorted(interrupted(objects))), None)
    if aside is None:
        aside = f"{ASIDE}{time.strftime('%Y%m%d-%H%M%S')}"
        objects.write(f"{aside}/{UNFINISHED}", b"")
        copy_entries(objects, "journal", aside)
    known = readable_part(objects, aside, location)
    for key in sorted(objects.keys("journal"), reverse=True):
        objects.delete(key)
    journal, chain = Journal(), Chain(location)
    for entry in entries_of(objects, known):
        seq = journal.last_seq + 1
        content = json.dumps(entry | chain.link(seq)).encode()
        chain.follow(journal, content)
        objects.create(entry_key(seq), content)
    objects.delete(f"{aside}/{UNFINISHED}")
    return journal


def interrupted(objects: ObjectStore) -> list[str]:
    """Directories of old journals from which a new one was not made to its end."""
    keys = (found.key for found in objects.entries())
    return [key.partition("/")[0] for key in keys if key.startswith(ASIDE) and key.endswith(f"/{UNFINISHED}")]


def copy_entries(objects: ObjectStore, source: str, target: str) -> None:
    for key in list(objects.keys(source)):
        content = objects.read(key)
        assert content is not None
        objects.write(f"{target}/{key.removeprefix(f'{source}/')}", content)


def readable_part(objects: ObjectStore, directory: str, location: str) -> Journal:
    """What a journal says up to its first damage."""
    journal, chain = Journal(), Chain(location)
    while (content := objects.read(f"{directory}/{journal.last_seq + 1}.json")) is not None:
        try:
            chain.follow(journal, content)
        except DamagedError:
            break
    return journal


def entries_of(objects: ObjectStore, known: Journal) -> Iterator[dict[str, Any]]:
    """Of a journal that adds up to what is there."""
    versions = sorted(whole_versions(objects), key=lambda v: (v.metadata.get("published_at", 0), v.name, v.number))
    said = {"author": author(), "reason": "the journal was made anew"}
    whole = {(version.name, version.number) for version in versions}
    published = {(e["name"], e["number"]): e for e in known.entries if e["type"] == "publish"}
    for version in versions:
        made = {"type": "publish", "name": version.name, "number": version.number}
        made |= {"time": version.metadata.get("published_at", time.time())} | said
        earlier = published.get((version.name, version.number), {})
        yield made | unlinked(earlier)
    for (name, number), tags in sorted(known.tags.items()):
        if (name, number) in whole and tags:
            yield {"type": "tag", "name": name, "number": number, "add": tags, "remove": [], "time": time.time()} | said
    for entry in known.entries:  # moves in their order, so that a rollback goes where it would have gone
        if entry["type"] == "alias" and (entry["name"], entry["number"]) in whole:
            yield unlinked(entry)
