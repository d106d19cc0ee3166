"""Random bases with Qwen3's layers and a tokenizer of bytes, in the sizes of docs/benchmarks/gpu.md."""

from pathlib import Path

SIZES = {  # hidden, MLP, layers, heads, key heads, vocabulary
    "tiny": (64, 128, 2, 4, 2, 259),
    "26m": (512, 1536, 6, 8, 4, 8192),
    "1.7b": (2048, 6144, 28, 16, 8, 151936),
}
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_random_model(directory: Path, size: str) -> Path:
    """In bfloat16 where there is a GPU to make it on: 1.7B parameters take seconds there, minutes on a CPU."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*specials, *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    tokenizer.add_special_tokens(specials)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    wrapped.chat_template = CHATML

    hidden, mlp, layers, heads, key_heads, vocabulary = SIZES[size]
    config = Qwen3Config(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=hidden // heads,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        eos_token_id=specials.index("<|im_end|>"),
        bos_token_id=None,
        pad_token_id=specials.index("<|endoftext|>"),
    )
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen3ForCausalLM(config)
    model.to(dtype=dtype)  # pyright: ignore
    model.save_pretrained(directory)
    wrapped.save_pretrained(directory)
    return directory
