"""`ftray plan` on the shipped configs, and against figures that others published (docs/explanation/plan.md)."""

import itertools
import json
import re

import pytest
from tiny import write_jsonl

from ftray.cli.main import main
from ftray.config import parse_config
from ftray.errors import UserError
from ftray.plan.gpus import GPUS
from ftray.plan.measure import measure_model
from ftray.plan.memory import plan_memory
from ftray.plan.model_size import read_model_config
from ftray.plan.options import Work, cheapest, options

GIB = 2**30
CLUSTER_CONFIGS = {  # GPUs each is written for
    "qwen3_8b_lora": "h100-80gb",
    "llama31_8b_full": "h100-80gb",
    "llama31_70b_lora": "h100-80gb",
    "qwen3_8b_long_context": "h100-80gb",
    "qwen3_8b_qlora_24gb": "rtx4090-24gb",
    "qwen35_9b_lora": "h100-80gb",
    "gpt_oss_20b_experts": "h100-80gb",
    "gemma3_12b_lora": "h100-80gb",
}
L2_7B, L2_13B, L31_8B, L31_70B = (
    f"meta-llama/{name}" for name in ("Llama-2-7b-hf", "Llama-2-13b-hf", "Llama-3.1-8B", "Llama-3.1-70B")
)
QV = {"adapter.targets": "[q_proj, v_proj]", "adapter.rank": 8}
NF4 = {"adapter.quantize_base": "nf4"}
SHARDED = {"adapter.targets": "[q_proj, k_proj, v_proj]", "zero.stage": 3, "memory.activation_checkpointing": "true"}
# (base, GPUs, tokens of a micro-batch, settings, allocated bytes as published, ours may differ by)
PUBLISHED = {
    "litgpt: Llama 2 7B, LoRA, 1,304 tokens": (L2_7B, 1, 1304, QV, 21.30e9, 0.1),
    "litgpt: Llama 2 7B, LoRA, 2,608 tokens": (L2_7B, 1, 2608, QV, 29.07e9, 0.1),
    "litgpt: Llama 2 13B, LoRA, 1,304 tokens": (L2_13B, 1, 1304, QV, 38.12e9, 0.1),
    "litgpt: Llama 3 8B, LoRA, 512 tokens": (L31_8B, 1, 512, QV | {"adapter.rank": 32}, 19.73e9, 0.1),
    "litgpt: Llama 2 7B, QLoRA, 1,304 tokens": (L2_7B, 1, 1304, QV | NF4, 13.84e9, 0.2),
    "torchtune: Llama 3.1 70B, LoRA, 8 GPUs": (L31_70B, 8, 4096, SHARDED, 27.6 * GIB, 0.1),
}


def make_config(base, gpus, tokens, settings):
    values = settings | {
        "batch.tokens_per_micro_batch": tokens,
        "data.max_example_tokens": min(tokens, 2048),
        "workers.count": gpus,
    }
    text = f"kind: run\nname: p\nbase_model: {base}\nmax_steps: 1\ndata: {{train: x}}\n"
    return parse_config(text, [f"{key}={value}" for key, value in values.items()], kind="run", source="x")


def run_plan(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["plan", *words])
    return int(ended.value.code or 0)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_figures(name):
    base, gpus, tokens, settings, published, within = PUBLISHED[name]
    config = make_config(base, gpus, tokens, settings)
    size = measure_model(read_model_config(base), config.adapter, dtype="bfloat16")
    memory = plan_memory(config, size, GPUS["a100-80gb"], workers=gpus)
    assert memory.total - memory.context == pytest.approx(published, rel=within)


def test_the_states_of_the_zero_paper():
    """Rajbhandari et al. 2020, figure 1: 7.5B parameters on 64 GPUs. ftray adds gradients up in 4 bytes, not 2."""
    config = make_config(L2_7B, 64, 4096, {"adapter": "null"})
    size = measure_model(read_model_config(L2_7B), None, dtype="bfloat16")
    longer_sums = 2 * 7.5 / 64
    for stage, gigabytes in ((1, 31.4), (2, 16.6 + longer_sums), (3, 1.9 + longer_sums)):
        at = config.model_copy(update={"zero": config.zero.model_copy(update={"stage": stage})})
        memory = plan_memory(at, size, GPUS["h100-80gb"], workers=64)
        states = (memory.weights + memory.gradients + memory.optimizer) * 7.5 / size.total
        assert states == pytest.approx(gigabytes, rel=0.02)


@pytest.mark.parametrize("name", CLUSTER_CONFIGS)
def test_the_shipped_configs_fit_the_gpus_they_name(name, capsys):
    path = f"configs/run/{name}.yaml"
    assert run_plan(path, "--gpu", CLUSTER_CONFIGS[name], "--examples", "10000", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["asked"]["fits"], plan["asked"]
    assert plan["asked"]["gpu_hours"] > 0
    fitting = [option["step_s"] for option in plan["options"] if option["fits"]]
    assert plan["cheapest"] is not None
    assert min(fitting) <= plan["asked"]["step_s"] * 1.001


def test_what_does_not_fit_is_said_and_more_memory_allows_more(capsys):
    config = make_config(L31_8B, 8, 4096, {})
    size = measure_model(read_model_config(L31_8B), config.adapter, dtype="bfloat16")
    work = Work(examples=64, tokens_per_example=2048)
    found = [
        options(config, size, GPUS[name], work, workers=8, per_node=8, mfu=0.4)
        for name in ("a10g-24gb", "a100-40gb", "a100-80gb")
    ]
    for smaller, larger in itertools.pairwise(found):
        for a, b in zip(smaller, larger, strict=True):
            assert b.fits or not a.fits
            assert a.config.batch.tokens_per_micro_batch <= b.config.batch.tokens_per_micro_batch
    assert cheapest(found[-1]) is not None
    larger = f"base_model={L31_70B}"
    assert run_plan("configs/run/qwen3_8b_qlora_24gb.yaml", larger, "--gpu", "rtx4090-24gb") == 1
    out = capsys.readouterr().out
    assert "does not fit" in out
    assert "nothing fits: take more or larger GPUs" in out
    assert run_plan("configs/run/llama31_8b_full.yaml", "--gpu", "h100") == 2
    assert "did you mean h100-80gb?; known are h100-80gb" in capsys.readouterr().err


def test_what_cannot_run_is_refused_as_the_workers_would(capsys):
    config = "configs/run/qwen3_8b_long_context.yaml"
    assert run_plan(config, "--count", "6") == 2
    assert "--count: memory.sequence_parallel 4 does not divide 6 GPUs" in capsys.readouterr().err
    assert run_plan("configs/run/qwen3_8b_lora.yaml", "zero.stage=0") == 0  # the other stages are planned
    out = capsys.readouterr().out
    assert "the config as it is cannot run on h100-80gb: zero.stage: 0 has no float32 master weights" in out
    assert "cheapest that fits: zero.stage=" in out
    assert "as asked" not in out
    assert run_plan("configs/run/qwen3_8b_qlora_24gb.yaml", f"base_model={L31_70B}", "--gpu", "l4-24gb", "--json") == 1
    assert json.loads(capsys.readouterr().out)["cheapest"] is None


def test_models_that_are_not_computed_are_not_planned():
    from transformers import DeepseekV32Config, GPT2Config

    for config, message in (
        (DeepseekV32Config(num_hidden_layers=1), "uses indexed attention"),
        (GPT2Config(n_layer=1), "a gpt2 model cannot be counted"),
    ):
        with pytest.raises(UserError, match=message):
            measure_model(config.to_dict(), None, dtype="bfloat16")


def test_modules_and_patterns_of_single_layers_are_counted():
    plain = make_config(L2_7B, 1, 1024, {})
    more = make_config(L2_7B, 1, 1024, {"adapter.modules_to_save": '["layers.30.mlp.down_proj"]',
                                        "adapter.targets": '["layers.30.self_attn.q_proj"]'})  # fmt: skip
    sizes = [measure_model(read_model_config(L2_7B), c.adapter, dtype="bfloat16") for c in (plain, more)]
    assert sizes[1].trained == 11008 * 4096 + 16 * (4096 + 4096)
    assert sizes[0].total - sizes[0].trained == sizes[1].total - sizes[1].trained


@pytest.mark.parametrize("name", CLUSTER_CONFIGS)
def test_the_shipped_configs_are_dry_run(name, tiny_model, train_file, tmp_path, capsys, monkeypatch):
    """With a tiny base in the place of the large one, and its context, for a cluster: here there are no GPUs."""
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    documents = write_jsonl(tmp_path / "documents.jsonl", [{"text": "the sea was calm and grey " * 40}] * 5)
    data = documents if "long_context" in name else train_file
    changes = [f"base_model={tiny_model}", f"data.train={data}", f"runs_dir={tmp_path}"]
    changes += ["data.max_example_tokens=512"] if "long_context" in name else [f"data.eval={train_file}"]
    changes += ["adapter.experts=false"] if "experts" in name else []  # the tiny base has none
    with pytest.raises(SystemExit) as ended:
        main(["train", f"configs/run/{name}.yaml", *changes, "--dry-run"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "# would run: " in out
    assert re.search(r" examples(,| of )", out)
    assert not (tmp_path / "checkpoints").exists()
