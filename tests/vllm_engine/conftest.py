"""The base and the adapters of the tests of vLLM."""

import pytest
from tiny import VLLM_SIZES, write_peft_adapter, write_tiny_model

from ftray.model.base import prepare_base


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return prepare_base(str(write_tiny_model(tmp_path_factory.mktemp("wide"), **VLLM_SIZES)))


@pytest.fixture(scope="session")
def adapters(tmp_path_factory, base):
    root = tmp_path_factory.mktemp("adapters")
    ranks = {"r4": 4, "r8": 8, "r8b": 8, "r16": 16}
    made = {
        name: write_peft_adapter(root / name, base.directory, rank=rank, seed=seed)
        for seed, (name, rank) in enumerate(ranks.items(), start=1)
    }
    patterns = {"rank_pattern": {"q_proj": 16, "layers.1.*.up_proj": 2}, "alpha_pattern": {"v_proj": 64}}
    return made | {"patterns": write_peft_adapter(root / "patterns", base.directory, rank=8, seed=9, **patterns)}
