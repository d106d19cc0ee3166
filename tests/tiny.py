"""A tiny random model with a byte tokenizer, peft adapters for it, and chat rows. No network, no hub."""

import json
from pathlib import Path

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
VLLM_SIZES = {"hidden_size": 128, "num_attention_heads": 4, "head_dim": 32}  # heads that vLLM has kernels for
INITIALIZER_RANGE = 0.15  # wide enough that the most likely token is never a near tie
# What the trials of a sweep start from, where nothing trains: its files need not exist.
RUN_OF_SWEEPS = """
kind: run
name: r
base_model: base
max_steps: 40
data: {train: train.jsonl, eval: eval.jsonl, max_example_tokens: 256}
batch: {tokens_per_micro_batch: 512}
evaluation: {every: 10}
"""


def make_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    tokenizer.add_special_tokens(specials)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    wrapped.chat_template = CHATML
    return wrapped


def write_tiny_model(directory: Path, *, seed: int = 0, tied: bool = True, tokenizer=None, **sizes: int) -> Path:
    """`sizes`: other values of the config's own keys."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    tokenizer = tokenizer or make_tokenizer()
    small = SIZES | {"vocab_size": len(tokenizer), "max_position_embeddings": 4096}
    config = LlamaConfig(
        **(small | sizes),  # pyright: ignore[reportArgumentType]
        initializer_range=INITIALIZER_RANGE,
        tie_word_embeddings=tied,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def write_peft_adapter(directory: Path, base: Path, *, rank: int, seed: int, targets="all-linear", **options) -> Path:
    """A LoRA made by peft itself, with a B that is not zero."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM", **options)
    model = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)
    model.save_pretrained(directory)
    return directory


def lora_value(name: str, shape):
    """Reproducible LoRA weights by name, the same in two programs that are compared."""
    import zlib

    import torch

    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()))) * 0.1


def chat_rows(count: int, *, seed: int = 0) -> list[dict]:
    import random

    rng = random.Random(seed)
    words = ["card", "lost", "money", "transfer", "pin", "rate", "refund", "help", "where", "my", "is", "the"]
    rows = []
    for _ in range(count):
        question = " ".join(rng.choices(words, k=rng.randint(2, 9)))
        rows.append(
            {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": question.split()[0]}]}
        )
    return rows


def pair_rows(count: int, *, seed: int = 0) -> list[dict]:
    """Preference pairs of two answers of different length."""
    return [
        {
            "prompt": row["messages"][:1],
            "chosen": row["messages"][1:],
            "rejected": [{**row["messages"][1], "content": other}],
        }
        for row, other in zip(chat_rows(count, seed=seed), (f"no, {i} times" for i in range(count)), strict=True)
    ]


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_checkpoint(run: Path, step: int) -> Path:
    """checkpoints/step-N of a run directory, whole, as far as its manifest tells."""
    import torch
    from safetensors.torch import save_file

    from ftray.storage import write_json, write_manifest

    directory = run / "checkpoints" / f"step-{step}"
    directory.mkdir(parents=True)
    save_file({"x": torch.zeros(10)}, directory / "moments.safetensors")
    write_json(directory / "trainer.json", {"step": step, "data_digest": "d", "world_size": 1, "zero_stage": 0})
    write_manifest(directory, metadata={"step": step})
    return directory
