"""A version's model card: where it comes from, what it measured, how to use it; Markdown, made from its manifest."""

import time
from typing import Any

from ftray.registry.reader import AdapterVersion, RegistryReader


def model_card(registry: RegistryReader, version: AdapterVersion) -> str:
    metadata = version.metadata
    aliases = [alias for alias, number in registry.aliases(version.name).items() if number == version.number]
    sections = [
        f"# {version}",
        table(
            {
                "base model": metadata.get("base_model"),
                "base fingerprint": metadata.get("base_fingerprint"),
                "rank": metadata.get("rank"),
                "size": f"{metadata['num_bytes']:,} bytes" if "num_bytes" in metadata else None,
                "published": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(metadata["published_at"])),
                "aliases": ", ".join(aliases),
                "tags": ", ".join(registry.tags(version.name, version.number)),
            }
        ),
    ]
    for title, key in (("Where it comes from", "lineage"), ("Measured", "metrics")):
        if metadata.get(key):
            sections += [f"## {title}", table(metadata[key])]
    files = {entry.path: f"{entry.size:,} bytes, sha256 {entry.sha256[:16]}…" for entry in version.manifest.files}
    sections += ["## Files", table(files)]
    sections += ["## Use", f'Ask an endpoint for `"model": "{version}"`, or load the directory with `peft`.']
    return "\n\n".join(sections) + "\n"


def table(rows: dict[str, Any]) -> str:
    reported = [f"| {key} | {value} |" for key, value in rows.items() if value not in (None, "")]
    return "\n".join(["| | |", "|---|---|", *reported])
