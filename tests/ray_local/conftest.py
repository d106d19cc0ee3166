"""Runs through Ray Train with two workers."""

import pytest

from ftray.config import parse_config


@pytest.fixture
def config(tiny_model, train_file, eval_file, tmp_path):
    def make(**settings):
        text = f"kind: run\nname: demo\nbase_model: {tiny_model}\ndata: {{train: {train_file}, eval: {eval_file}}}\n"
        chosen = {
            "max_steps": 8,
            "runs_dir": tmp_path / "runs",
            "workers.count": 2,
            "batch.examples_per_step": 4,
            "optimizer.learning_rate": 5e-3,
            "checkpoint.every": 4,
            "evaluation.every": 4,
        } | {key.replace("__", "."): value for key, value in settings.items()}
        return parse_config(text, [f"{key}={value}" for key, value in chosen.items()], kind="run", source="test")

    return make
