"""What `ftray data inspect` found, as one HTML file that needs no network."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import jinja2

from ftray.data.inspect import Inspection, training_sources
from ftray.storage import write_bytes

TEMPLATE = Path(__file__).with_name("inspect.html")


def write_page(path: Path, name: str, found: Sequence[Inspection]) -> None:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        name=name, found=found, shares=defaultdict(str, shares_of_tokens(found))
    )
    write_bytes(path.absolute(), page.encode())


def shares_of_tokens(found: Sequence[Inspection]) -> dict[str, str]:
    """By key, of several training sources: as a percentage."""
    sources = training_sources(found)
    total = max(1, sum(source.tokens for source in sources))
    return {source.key: f"{source.tokens / total:.0%}" for source in sources} if len(sources) > 1 else {}
