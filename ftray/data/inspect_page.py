"""What `ftray data inspect` found, as one HTML file that needs no network."""

from collections.abc import Sequence
from pathlib import Path

import jinja2

from ftray.data.inspect import Inspection
from ftray.storage import write_bytes

TEMPLATE = Path(__file__).with_name("inspect.html")


def write_page(path: Path, name: str, found: Sequence[Inspection]) -> None:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(name=name, found=found)
    write_bytes(path.absolute(), page.encode())
