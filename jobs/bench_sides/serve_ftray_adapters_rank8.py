"""Our engine, 8 adapters of rank 8 mixed in one batch: half the factors to read."""

from decode import decode
from shared import random_adapters

decode(random_adapters(rank=8))
