"""A base that two workers share, as an endpoint places them: replica and workers in the bundles of a placement group.

vLLM knows Ray on GPUs only. A plugin of vLLM says in each of its processes that a CPU is one, and Ray is told of two
GPUs that are not there: what is left out is NCCL and CUDA. Run by `make test-vllm`.
"""

import os

import pytest

pytest.importorskip("vllm")

import httpx
import ray
from engine_contract import Reference
from ray import serve
from ray.util import placement_group_table

from ftray.cluster.session import on_loopback
from ftray.config import ServeConfig
from ftray.model.base import load_tokenizer
from ftray.registry import Registry
from ftray.serve.app import start_endpoint, stop_endpoint

PORT = 8231
PROMPT = [5, 9, 33, 60, 7]
NUM_TOKENS = 8
PLUGIN = {
    "as_if_gpu.py": "def platform():\n    return 'cpu_as_gpu.CpuAsGpu'\n",
    "cpu_as_gpu.py": "from vllm.platforms.cpu import CpuPlatform\n\n"
    "class CpuAsGpu(CpuPlatform):\n    ray_device_key = 'GPU'\n",
    "as_if_gpu-0.dist-info/METADATA": "Metadata-Version: 2.1\nName: as-if-gpu\nVersion: 0\n",
    "as_if_gpu-0.dist-info/entry_points.txt": "[vllm.platform_plugins]\nas_if_gpu = as_if_gpu:platform\n",
}


@pytest.fixture(scope="module")
def cluster_of_two_gpus(tmp_path_factory):
    plugin = tmp_path_factory.mktemp("plugin")
    for name, text in PLUGIN.items():
        (plugin / name).parent.mkdir(exist_ok=True)
        (plugin / name).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(plugin), os.environ.get("PYTHONPATH", "")]))
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        with on_loopback():  # as a session of `ftray serve` is
            ray.init("local", num_cpus=2, num_gpus=2, include_dashboard=False)
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def url(cluster_of_two_gpus, base, adapters, tmp_path_factory):
    registry = Registry(str(tmp_path_factory.mktemp("registry")))
    for name, directory in adapters.items():
        registry.publish(name, directory, metadata={"base_fingerprint": base.fingerprint})
    config = ServeConfig.model_validate(
        {
            "kind": "serve",
            "base_model": str(base.directory),
            "served_name": "base",
            "port": PORT,
            "engine": {"type": "vllm", "tensor_parallel": 2, "context_tokens": 256, "kv_cache_tokens": 4096},
            "adapters": {"registry": registry.location, "max_rank": 16},
            "replicas": {"gpus_each": 2},
        }
    )
    yield start_endpoint(config)
    stop_endpoint()
    serve.shutdown()


def likeliest(reference: Reference, name: str | None) -> list[int]:
    ids = list(PROMPT)
    for _ in range(NUM_TOKENS):
        ids.append(int(reference.log_probs(name, ids)[-1].argmax()))
    return ids[len(PROMPT) :]


def test_base_and_adapters_answer_as_peft_does(url, base, adapters):
    reference, tokenizer = Reference(base.directory, adapters), load_tokenizer(base)
    expected = {name: tokenizer.decode(likeliest(reference, name)) for name in (None, *adapters)}
    expected = {name: text.rstrip("\ufffd") for name, text in expected.items()}  # half a character is not sent
    assert len(set(expected.values())) == len(expected)  # another's answer would be seen
    for name, text in expected.items():
        model = "base" if name is None else f"{name}@1"
        body = {"model": model, "prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["text"] == text


def test_replica_and_workers_share_the_bundles_of_one_group(url):
    (group,) = [group for group in placement_group_table().values() if group["state"] == "CREATED"]
    assert list(group["bundles"].values()) == [{"CPU": 1.0, "GPU": 1.0}, {"GPU": 1.0}]
    assert group["strategy"] == "STRICT_PACK"
    left = ray.available_resources()
    free = {bundle: sum(left[name] for name in left if name.startswith(f"GPU_group_{bundle}_")) for bundle in (0, 1)}
    assert free == pytest.approx({0: 0, 1: 0.1})  # of the first GPU the replica has what its worker leaves
    assert "GPU" not in left
    names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
    assert sorted(name[-3:] for name in names if name.startswith("vllm_Worker")) == ["TP0", "TP1"]
