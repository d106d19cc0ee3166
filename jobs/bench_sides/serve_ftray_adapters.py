"""Our engine, 8 adapters of rank 16 mixed in one batch."""

from decode import decode
from shared import random_adapters

decode(random_adapters())
