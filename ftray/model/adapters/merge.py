"""An adapter added into its base for good: a Hugging Face directory that trains and serves like any base model.

For adapters that cannot be hosted beside others (DoRA, modules_to_save), and to train a further adapter on top.
"""

import shutil
from pathlib import Path
from typing import Any

from ftray.errors import UserError
from ftray.model.base import BaseModel, keep_template
from ftray.model.weight_precision import check_precision
from ftray.model.weights import forget_quantisation, model_class, whole_weights
from ftray.storage import write_manifest


def merge_adapter(adapter: Path, base: BaseModel, directory: Path, *, label: str) -> Path:
    """W + s B A in every adapted module, in the base's dtype, with its tokenizer and a manifest that names both.

    Raises `UserError` when `directory` exists, or when the sum has a value that is not finite.
    """
    if directory.exists():
        raise UserError(f"{directory}: exists already; choose another directory")
    from peft import PeftModel
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    check_precision(base)
    settings: dict[str, Any] = {"dtype": "auto", "trust_remote_code": False} | whole_weights(base)
    plain: Any = model_class(base).from_pretrained(base.directory, **settings)
    forget_quantisation(plain)
    try:
        adapted: Any = PeftModel.from_pretrained(plain, adapter)
        merged = adapted.merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError) as error:  # a weight that is not finite; shapes of another base
        raise UserError(f"{label}: {str(error).strip().splitlines()[0]}; does it belong to {base.name}?") from None
    staging = directory.with_name(directory.name + ".new")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{directory} cannot be written: {error.strerror}; choose another directory") from None
    merged.save_pretrained(staging)
    AutoTokenizer.from_pretrained(base.directory, trust_remote_code=False).save_pretrained(staging)
    keep_template(base, staging)
    write_manifest(staging, metadata={"merged_adapter": label, **base.described})
    staging.rename(directory)
    return directory
