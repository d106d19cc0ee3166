"""What a ZeRO stage asks for, known before torch is imported."""

from ftray.errors import UserError

# Communication buckets are allocated whole; DeepSpeed's default of 5e8 elements is 2 GB for a 5 MB adapter.
MAX_BUCKET_ELEMENTS = 50_000_000


def bucket_elements(num_trainable: int) -> int:
    return max(1_000_000, min(MAX_BUCKET_ELEMENTS, num_trainable))


def check_stage(stage: int, dtype: str) -> None:
    """`dtype`: as a name, "bfloat16" or "float32". Raises `UserError`."""
    if stage == 0 and dtype == "bfloat16":
        raise UserError("zero.stage: 0 has no float32 master weights and diverges in bfloat16; use stage 1, 2 or 3")
