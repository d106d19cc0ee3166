"""Clients of OpenAI's API that nobody here wrote, each in an environment of its own, against a live endpoint."""

import json
import os
import socket
import subprocess
import time
from pathlib import Path

import httpx
import pytest
import torch
from tiny import write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from ftray.artifacts.publish import publish_adapter
from ftray.config import parse_config
from ftray.registry import Registry
from ftray.serve.app import start_endpoint, stop_endpoint

ROOT = Path(__file__).parents[2]
CLIENTS, VLLM = ROOT / ".venv-clients", ROOT / ".venv-vllm" / "bin"
PROXY_KEY = "sk-0123456789abcdef0123456789abcdef"
QUESTIONS = ["where is the refund of my", "my order has not", "can you cancel the"]
CHOICES = ["money", "come", "order please"]


@pytest.fixture(scope="module")
def registry(tmp_path_factory, adapters):
    registry = Registry(str(tmp_path_factory.mktemp("clients") / "registry"))
    publish_adapter(registry, "support", adapters["r8"])
    registry.promote("support@1", "prod")
    return registry


@pytest.fixture(scope="module")
def url(ray_session, registry, tiny_model, serve_port):
    config = parse_config(
        f"kind: serve\nbase_model: {tiny_model}\nserved_name: tiny\nport: {serve_port}\n"
        "engine: {max_sequences: 8, context_tokens: 2048, kv_cache_tokens: 16384}\n"
        f"adapters: {{registry: {registry.location}}}\n",
        kind="serve",
        source="test",
    )
    yield start_endpoint(config)
    stop_endpoint()


def run(command: list, **environment: str) -> str:
    quiet = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "NO_PROXY": "*", "OPENAI_API_KEY": "none"}
    done = subprocess.run(
        [str(word) for word in command],
        env=os.environ | quiet | environment,
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def python_of(name: str) -> Path:
    """Of the client's own environment."""
    python = CLIENTS / name / "bin" / "python"
    if not python.exists():
        pytest.skip("`make test-clients` makes its environment")
    return python


def reported_by(name: str, *arguments: str) -> dict:
    script = ROOT / "tests/clients" / f"{name}_client.py"
    return json.loads(run([python_of(name), script, *arguments]).strip().splitlines()[-1])


def test_langchain(url):
    reported = reported_by("langchain", url, "tiny", "support")
    assert reported["model"] == "support@1"
    assert reported["text"] == reported["streamed"] == reported["batch"][0] != reported["batch"][1]
    assert reported["usage"]["output_tokens"] == 24
    assert reported["usage"]["total_tokens"] == reported["streamed_usage"]["total_tokens"]
    assert reported["order"]["about"] in ("refund", "delivery")
    assert (reported["call"], reported["arguments"]) == ("weather", ["city"])
    assert reported["answered"] == "length"
    assert reported["by_function"] in ("refund", "delivery")
    assert reported["plain"] == ["city"]
    assert reported["after a broken call"] == "length"


def test_openai_python(url):
    reported = reported_by("openai", url, "tiny", "support")
    assert reported["model"] == "support@1"
    assert reported["retrieved"] == ["tiny", "support"]
    assert reported["logprobs"]
    assert reported["same id"]
    assert (reported["call"], reported["streamed"]) == ("Order", [["Order"], True])
    assert {reported["order"], reported["parsed"]} <= {"refund", "delivery"}
    assert (reported["too long"], reported["unknown"]) == ("context_length_exceeded", "model_not_found")


def test_instructor(url):
    reported = reported_by("instructor", url, "tiny", "support")
    assert set(reported) == {"TOOLS", "TOOLS_STRICT", "JSON_SCHEMA"}
    assert set(reported.values()) <= {"refund", "delivery"}


def test_pydantic_ai(url):
    reported = reported_by("pydantic_ai", url, "tiny", "support")
    assert reported["text"]
    assert reported["order"] in ("refund", "delivery")
    assert reported["either"] in ("Order", "Nothing")


def test_litellm_and_its_proxy(url, tmp_path):
    config = tmp_path / "proxy.yaml"
    model = {"model": "openai/support", "api_base": f"{url}/v1", "api_key": "none"}
    config.write_text(json.dumps({"model_list": [{"model_name": "support", "litellm_params": model}]}))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [python_of("litellm").with_name("litellm"), "--config", config, "--host", "127.0.0.1", "--port", port]
    settings = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_MASTER_KEY": PROXY_KEY, "NO_PROXY": "*"}
    environment = os.environ | settings  # its prices are on the network, and it wants a key
    said = (tmp_path / "proxy.log").open("wb")
    words = [str(word) for word in command]
    with said, subprocess.Popen(words, stdout=said, stderr=subprocess.STDOUT, env=environment) as proxy:
        try:
            wait_for(f"http://127.0.0.1:{port}/health/liveliness", proxy, tmp_path / "proxy.log")
            reported = reported_by("litellm", url, "support", f"http://127.0.0.1:{port}", PROXY_KEY)
        finally:
            proxy.terminate()
    assert reported["openai"] is reported["hosted_vllm"] is True
    assert reported["too long"] == "ContextWindowExceededError"
    assert reported["proxy"] == [200, 200, 200]  # one user's unknown path is no reason to leave the model out


def wait_for(url: str, process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        try:
            if httpx.get(url).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise AssertionError(f"{url} does not answer: {log.read_text()[-2000:]}")


def test_llamaindex(url):
    reported = reported_by("llamaindex", url, "tiny", "support")
    assert reported["text"]
    assert (reported["call"], reported["arguments"], reported["auto"]) == ("weather", ["city"], "assistant")
    assert reported["order"] in ("refund", "delivery")


def test_dspy(url):
    reported = reported_by("dspy", url, "tiny", "support")
    assert reported["text"]
    assert reported["kind"] in ("refund", "delivery")


def test_node(url):
    """openai-node, and Vercel's AI SDK."""
    place = CLIENTS / "node"
    if not (place / "node_modules").is_dir():
        pytest.skip("`make test-clients` makes its environment, where there is node")
    script = place / "node_client.mjs"
    script.write_text((ROOT / "tests/clients/node_client.mjs").read_text())  # it finds its packages beside it
    reported = json.loads(run(["node", script, url, "tiny", "support"]).strip().splitlines()[-1])
    assert reported["model"] == "support@1"
    assert reported["same"] is reported["ai sdk"] is True
    assert reported["retrieved"] == ["tiny", "support"]
    assert reported["object"] in ("refund", "delivery")
    assert (reported["call"], reported["arguments"]) == ("weather", ["city"])


def test_lm_evaluation_harness_finds_the_log_likelihoods_of_transformers(url, tmp_path, tiny_model, adapters):
    """Through its own tokenizer calls, batches of prompts as token ids, and echo; and what it makes of generations."""
    rows = [{"question": question, "choices": CHOICES, "answer": number} for number, question in enumerate(QUESTIONS)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    common = f"dataset_path: json\ndataset_kwargs: {{data_files: {data}}}\ntest_split: train\n"
    (tmp_path / "likely.yaml").write_text(
        f"task: likely\n{common}output_type: multiple_choice\n"
        'doc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: answer\n'
        "metric_list: [{metric: acc}]\n"
    )
    (tmp_path / "written.yaml").write_text(
        f"task: written\n{common}output_type: generate_until\n"
        'doc_to_text: "{{question}}"\ndoc_to_target: "{{choices[answer]}}"\n'
        "generation_kwargs: {max_gen_toks: 8, until: ['zzz']}\nmetric_list: [{metric: exact_match}]\n"
    )
    served = f"model=support,base_url={url}/v1/completions,num_concurrent=2,max_retries=1,max_length=512"
    run(
        [
            *(python_of("lm_eval").with_name("lm_eval"), "run", "--model", "local-completions", "--model_args", served),
            *("--tasks", "likely,written", "--include_path", tmp_path, "--batch_size", 2),
            *("--output_path", tmp_path / "out", "--log_samples"),
        ],
        HF_HOME=str(tmp_path / "hf"),
    )
    model = peft_model(tiny_model, adapters["r8"])
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    (likely,) = (tmp_path / "out").rglob("samples_likely_*.jsonl")
    reported = {sample["doc_id"]: sample for sample in map(json.loads, likely.read_text().splitlines())}
    for number, question in enumerate(QUESTIONS):
        for choice, (log_likelihood, is_greedy) in zip(CHOICES, reported[number]["filtered_resps"], strict=True):
            want, greedy = log_likelihood_of(model, tokenizer, question, f" {choice}")
            assert float(log_likelihood) == pytest.approx(want, abs=2e-3)
            assert (str(is_greedy) == "True") == greedy
    (written,) = (tmp_path / "out").rglob("samples_written_*.jsonl")
    samples = list(map(json.loads, written.read_text().splitlines()))
    assert len(samples) == 3
    assert all(sample["filtered_resps"][0] for sample in samples)


def peft_model(base: Path, adapter: Path):
    from peft import PeftModel

    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)


def log_likelihood_of(model, tokenizer, context: str, continuation: str) -> tuple[float, bool]:
    """As lm-evaluation-harness defines it: of the tokens that come on top of the context's."""
    whole, start = tokenizer(context + continuation)["input_ids"], len(tokenizer(context)["input_ids"])
    with torch.no_grad():
        log_probs = model(torch.tensor([whole])).logits[0].log_softmax(-1)[start - 1 : -1]
    target = torch.tensor(whole[start:])
    likely = log_probs.gather(1, target[:, None])
    return float(likely.sum()), bool((log_probs.argmax(-1) == target).all())


@pytest.mark.skipif(not VLLM.exists(), reason="`make test-vllm` makes its environment")
@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
def test_vllms_serving_benchmark(url, tmp_path, tiny_model, backend):
    path = {"openai": "/v1/completions", "openai-chat": "/v1/chat/completions"}[backend]
    run(
        [
            *(VLLM / "python", ROOT / "tests/clients/vllm_bench.py", "--backend", backend),
            *("--base-url", url, "--endpoint", path),
            *("--model", "support", "--tokenizer", tiny_model, "--dataset-name", "random", "--num-prompts", 16),
            *("--random-input-len", 32, "--random-output-len", 12, "--ignore-eos", "--max-concurrency", 4),
            *("--save-result", "--result-dir", tmp_path, "--result-filename", "result.json"),
        ]
    )
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result["failed"]) == (16, 0)
    assert result["total_output_tokens"] == 16 * 12
    assert result["median_ttft_ms"] > 0
