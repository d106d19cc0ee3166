"""Our tokenising of a million generated chat rows: the rate, the peak memory, and the time once they are kept."""

import json
import random
import resource
import tempfile
import time
from pathlib import Path

from shared import BASE

from ftray.config.data import DataConfig
from ftray.data.tokens import tokenize_source
from ftray.model.base import load_tokenizer
from ftray.model.chat import ChatRenderer

ROWS = 1_000_000
WORDS = "card lost money transfer pin rate refund help where my is the account branch open today"


def write_rows(path: Path) -> None:
    rng, words = random.Random(0), WORDS.split()
    with path.open("w") as file:
        for _ in range(ROWS):
            question, answer = (" ".join(rng.choices(words, k=rng.randint(4, 30))) for _ in range(2))
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}) + "\n")


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="ftray-bench-") as scratch:
        path = Path(scratch) / "rows.jsonl"
        write_rows(path)
        data, renderer = DataConfig(train=str(path)), ChatRenderer(load_tokenizer(BASE))
        seconds = []
        for _ in range(2):
            began = time.perf_counter()
            dataset = tokenize_source("data.train", str(path), data, renderer, kept_in=Path(scratch) / "kept")
            seconds.append(time.perf_counter() - began)
        peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        result = {
            "tokens_per_s": round(len(dataset.ids) / seconds[0]),
            "rows_per_s": round(ROWS / seconds[0]),
            "seconds": round(seconds[0], 1),
            "seconds_when_kept": round(seconds[1], 1),
            "num_tokens": len(dataset.ids),
            "peak_gib_of_one_process": round(peak / 2**20, 2),
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
