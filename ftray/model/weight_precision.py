"""Which precision a base's files have, and whether it is trained on. Without torch, which drivers do without."""

from ftray.errors import UserError
from ftray.model.base import BaseModel
from ftray.storage import read_json

# Quantised bases whose weights transformers multiplies out, by its settings for them.
WHOLE = {"mxfp4": "Mxfp4Config", "fp8": "FineGrainedFP8Config"}


def precision_of(base: BaseModel) -> str | None:
    """How its files quantise it: mxfp4, fp8, awq, gptq, ...; None: they do not."""
    return (read_json(base.directory / "config.json").get("quantization_config") or {}).get("quant_method")


def check_precision(base: BaseModel, *, quantize: str | None = None) -> None:
    """Raises `UserError` for a quantised base that is not made whole while it is loaded."""
    method = precision_of(base)
    if method is not None and (method not in WHOLE or quantize is not None):
        beside = f", and cannot be quantised again to {quantize}" if method in WHOLE else ""
        raise UserError(
            f"base_model: {base.name} is quantised by {method}{beside}; ftray trains and serves it (engine.type: "
            "torch) from whole weights: give its unquantised original, or serve it with engine.type: vllm"
        )
