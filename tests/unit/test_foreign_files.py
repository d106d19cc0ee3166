"""What comes with others' models: their code is not run and their pickles are not read."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from ftray.errors import UserError
from ftray.model.base import load_tokenizer, prepare_base
from ftray.model.hardware import choose_hardware
from ftray.model.weights import load_weights

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({marker!r}).write_text("ran")

class TheirConfig(LlamaConfig):
    model_type = {model_type!r}

class TheirModel(LlamaForCausalLM):
    config_class = TheirConfig
"""


def with_code(base: Path, directory: Path, *, model_type: str) -> tuple[Path, Path]:
    """A model that brings code of its own, and the file that this code would write."""
    shutil.copytree(base, directory)
    marker = directory.parent / f"{directory.name}-ran"
    (directory / "theirs.py").write_text(CODE.format(marker=str(marker), model_type=model_type))
    path = directory / "config.json"
    config = json.loads(path.read_text())
    auto_map = {"AutoConfig": "theirs.TheirConfig", "AutoModelForCausalLM": "theirs.TheirModel"}
    path.write_text(json.dumps(config | {"model_type": model_type, "auto_map": auto_map}))
    return directory, marker


@pytest.fixture(autouse=True)
def modules(monkeypatch, tmp_path):
    """Where transformers would copy such code to."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


def test_a_base_that_needs_code_of_its_own_is_refused(tiny_model, tmp_path):
    directory, marker = with_code(tiny_model, tmp_path / "unknown", model_type="theirs")
    with pytest.raises(UserError, match=r"its config\.json wants code of its own \(theirs\.TheirConfig\)"):
        prepare_base(str(directory))
    assert not marker.exists()
    AutoConfig.from_pretrained(directory, trust_remote_code=True)  # the twin: who asks for it gets it
    assert marker.exists()


def test_a_base_that_transformers_has_runs_none_of_its_own(tiny_model, tmp_path):
    directory, marker = with_code(tiny_model, tmp_path / "known", model_type="llama")
    base = prepare_base(str(directory))
    load_tokenizer(base)
    model = load_weights(base, choose_hardware(), attention="sdpa")
    assert type(model).__module__.startswith("transformers.models.llama")
    assert not marker.exists()


def test_a_tokenizer_that_needs_code_of_its_own_is_refused(tiny_model, tmp_path):
    directory = shutil.copytree(tiny_model, tmp_path / "tokenizer")
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "TheirTokenizer"}
    path.write_text(json.dumps(config | {"auto_map": {"AutoTokenizer": ["theirs.TheirTokenizer", None]}}))
    (directory / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"its tokenizer_config\.json wants code of its own"):
        prepare_base(str(directory))


def test_pickled_weights_are_not_read(tiny_model, tmp_path):
    directory = shutil.copytree(tiny_model, tmp_path / "pickled", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save({}, directory / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"holds no \.safetensors weights"):
        prepare_base(str(directory))
