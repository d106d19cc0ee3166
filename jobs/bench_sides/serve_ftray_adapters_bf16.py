"""Our engine, 8 adapters of rank 16 saved in bfloat16, as most that are published, mixed in one batch."""

from decode import decode
from shared import random_adapters

decode(random_adapters(dtype="bfloat16"))
