"""What 8 adapters take of the base's rate: engines that decode in turns within one process, since between two processes
the machine's speed drifts by more than the difference."""

import json
import statistics
import time

from decode import Decoder
from shared import NEW_TOKENS, SEQUENCES, decoding_prompts, random_adapters

ROUNDS = 9
FIRST_TOKEN = 1000  # of a round's prompts, so that none begins as one before it


def main() -> None:
    decoders = {
        "base": Decoder([]),
        "rank16": Decoder(random_adapters()),
        "rank16_bf16": Decoder(random_adapters(dtype="bfloat16")),
        "rank8": Decoder(random_adapters(rank=8)),
    }
    prompts = decoding_prompts(decoders["base"].tokenizer)
    seconds: dict[str, list[float]] = {name: [] for name in decoders}
    for number in range(1 + ROUNDS):
        for name, decoder in decoders.items():
            firsts = range(FIRST_TOKEN + number * SEQUENCES, FIRST_TOKEN + (number + 1) * SEQUENCES)
            began = time.perf_counter()
            decoder.run([[first, *prompt[1:]] for first, prompt in zip(firsts, prompts, strict=True)], NEW_TOKENS)
            seconds[name].append(time.perf_counter() - began)
    told: dict[str, float] = {"tokens_per_s": round(SEQUENCES * NEW_TOKENS / statistics.median(seconds["base"][1:]), 1)}
    for name in ("rank16", "rank16_bf16", "rank8"):
        shares = [base / own for base, own in zip(seconds["base"][1:], seconds[name][1:], strict=True)]
        told[f"{name}_of_base"] = round(statistics.median(shares), 3)
        told[f"{name}_of_base_least"], told[f"{name}_of_base_most"] = round(min(shares), 3), round(max(shares), 3)
    print(json.dumps(told))


main()
