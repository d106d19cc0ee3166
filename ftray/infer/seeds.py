"""Seeds of a request's answers."""

import hashlib


def derived_seed(seed: int, index: int = 0) -> int:
    """Of answer `index`, 0 to 2**63 - 1. By a hash: were it `seed + index`, the second answer of one seed would be the
    first of the next, and an evaluation over seeds and n answers would count answers twice."""
    digest = hashlib.blake2b(f"{seed} {index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1
