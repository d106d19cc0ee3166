"""`pipeline.json` in the pipeline's directory: what it measured, decided and published."""

import json
from typing import Any

from ftray.storage import ObjectStore
from ftray.tracking.jobs import PIPELINE


def read_record(store: ObjectStore) -> dict[str, Any]:
    content = store.read(PIPELINE)
    return json.loads(content) if content is not None else {}


def keep(store: ObjectStore, **parts: Any) -> dict[str, Any]:
    record = read_record(store) | parts
    store.write(PIPELINE, (json.dumps(record, indent=2) + "\n").encode())
    return record
