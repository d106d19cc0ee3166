"""The Python API: light to import, pinned in its signatures, equal to the commands."""

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import chat_rows

import ftray
from ftray.api.config import rows_file
from ftray.errors import ConfigError, NotFoundError, UserError

ROOT = Path(__file__).parents[2]
SIGNATURES = {
    "train": "(config, *overrides, data=None, eval_data=None, callbacks=(), fresh=False, log=print)",
    "evaluate": "(config, *overrides, adapter=None, registry=None, endpoint=None, eval_data=None, task='exact_match')",
    "sweep": "(config, *overrides, fresh=False, log=print)",
    "load": "(model, *, registry='registry', base_model=None, context_tokens=2048)",
    "serve": "(config, *overrides)",
    "open_training": "(config, *overrides)",
    "Run.open": "(directory)",
    "Run.resume": "(self, *, callbacks=(), log=print)",
    "Run.publish": "(self, *, name=None, registry=None, alias=None)",
    "Model.chat": "(self, messages, *, adapter=None, **sampling)",
    "Model.stream": "(self, messages, *, adapter=None, **sampling)",
    "Model.use": "(self, adapter)",
    "Endpoint.chat": "(self, model, messages, **settings)",
    "Endpoint.stop": "(self)",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_stay(name):
    found = ftray
    for part in name.split("."):
        found = getattr(found, part)
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in inspect.signature(found).parameters.values()]
    text = re.sub(r"<[^>]*print[^>]*>", "print", str(inspect.Signature(plain)))  # Ray puts its own in the place of it
    assert text == SIGNATURES[name]


def test_importing_it_loads_nothing_heavy():
    heavy = "{'torch', 'ray', 'transformers', 'pydantic', 'numpy'}"
    program = f"import sys, ftray; dir(ftray); assert not {heavy} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_everything_offered_is_there():
    assert set(ftray.HOMES) == set(ftray.__all__) <= set(dir(ftray))
    assert all(getattr(ftray, name) is not None for name in ftray.__all__)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = ftray.trian  # pyright: ignore


def run_config(base: Path, directory: Path, **more) -> dict:
    small = {"adapter": {"rank": 4, "alpha": 8.0}, "batch": {"examples_per_step": 8}, "runs_dir": str(directory)}
    return {"name": "r", "base_model": str(base), "max_steps": 3, "optimizer": {"warmup_steps": 1}} | small | more


def test_rows_become_a_file_named_by_their_content(tmp_path):
    import pandas
    from datasets import Dataset

    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "ä", "completion": "c"}]
    file = rows_file(rows, runs_dir=str(tmp_path), key="data.train")
    assert file == rows_file(pandas.DataFrame(rows), runs_dir=str(tmp_path), key="data.train")
    assert file == rows_file(Dataset.from_list(rows), runs_dir=str(tmp_path), key="data.train")
    assert Path(file).read_text().count("\n") == 2
    assert rows_file("x.jsonl", runs_dir=str(tmp_path), key="data.train") == "x.jsonl"
    with pytest.raises(UserError, match="row 2 is of type str"):
        rows_file([{}, "b"], runs_dir=str(tmp_path), key="data.train")
    with pytest.raises(UserError, match="a runs_dir on a disk"):
        rows_file(rows, runs_dir="s3://bucket/runs", key="data.train")


def test_mistakes_are_errors_of_the_config(tiny_model, tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'rank'"):
        ftray.train(run_config(tiny_model, tmp_path, adapter={"rnak": 4}), data=chat_rows(4))
    with pytest.raises(UserError, match="no such file"):
        ftray.train(run_config(tiny_model, tmp_path), data=str(tmp_path / "none.jsonl"))
    with pytest.raises(NotFoundError, match="holds no run"):
        ftray.Run.open(tmp_path)


def test_what_ray_ships_may_name_the_package():
    """cloudpickle takes plain modules by name; ours have a class of their own."""
    from ray import cloudpickle

    import ftray.train as room

    def remote():
        return ftray.load, room

    assert cloudpickle.loads(cloudpickle.dumps(ftray)) is ftray
    assert cloudpickle.loads(cloudpickle.dumps(room)) is room
    assert cloudpickle.loads(cloudpickle.dumps(remote))()[1] is room


def test_a_run_is_resumed_where_it_lies(tmp_path, monkeypatch):
    """Moved, renamed, from another directory: by its own place, not by the one that its config names."""
    import json

    from ftray.config import parse_config

    text = "kind: run\nname: r\nbase_model: b\nmax_steps: 1\ndata: {train: t}\n"
    config = parse_config(text, kind="run", source="test")
    directory = tmp_path / "here" / "moved" / "q"
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config.model_dump(mode="json")))
    monkeypatch.chdir(tmp_path)
    started = []
    monkeypatch.setattr("ftray.api.run.train", lambda config, **_: started.append(config))
    ftray.Run.open(directory).resume()
    assert [(c.runs_dir, c.name, c.max_steps) for c in started] == [(str(directory.parent), "q", 1)]


def test_configs_and_rows_may_hold_paths_and_arrays(tiny_model, tmp_path):
    import numpy

    from ftray.api.config import read_config

    config = read_config(
        run_config(tiny_model, tmp_path) | {"base_model": tiny_model, "data": {"train": tmp_path / "t"}}, (), kind="run"
    )
    assert (config.base_model, config.data.train) == (str(tiny_model), str(tmp_path / "t"))
    file = rows_file([{"text": "a", "n": numpy.int64(3), "v": numpy.ones(2)}], runs_dir=str(tmp_path), key="data.train")
    assert json.loads(Path(file).read_text()) == {"text": "a", "n": 3, "v": [1.0, 1.0]}
    with pytest.raises(UserError, match="of type object"):
        rows_file([{"text": object()}], runs_dir=str(tmp_path), key="data.train")


def test_a_model_answers_with_adapters_swapped_under_it(tiny_model, adapters):
    model = ftray.load(str(adapters["r4"]), base_model=str(tiny_model))
    how = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
    with_adapter = model.chat("where is my card", **how)
    base = model.use(None).chat("where is my card", **how)
    assert base != with_adapter
    assert (
        model.chat([{"role": "user", "content": "where is my card"}], adapter=str(adapters["r4"]), **how)
        == with_adapter
    )
    pieces = model.stream("where is my card", **how)
    next(pieces)
    pieces.close()  # a reader that stops
    assert not model.engine.has_work
    streams = [model.stream("where is my card", adapter=adapter, **how) for adapter in (None, str(adapters["r4"]))]
    in_turn: list[list[str]] = [[], []]
    for number in [0, 1] * 8:  # each gets its own, whoever steps the engine
        in_turn[number] += [piece for piece in (next(streams[number], ""),) if piece]
    for number, stream in enumerate(streams):
        in_turn[number] += list(stream)
    assert ["".join(pieces) for pieces in in_turn] == [base, with_adapter]
    with pytest.raises(UserError, match="a chat has one answer"):
        model.chat("x", n=2)
    assert model.chat("where is my card", **how) == base
    model.close()


def test_the_minimal_loop_is_the_real_one(tiny_model, tmp_path, train_file):
    """docs/examples/minimal_train.py in a process of its own against the loop of the product on one rank."""
    from ranks import Record, config_of, train_on_ranks

    from ftray.config import to_yaml

    record = Record("real", stage=2, tokens_per_micro_batch=256, dropout=0.1)
    fixed = {"base_directory": str(tiny_model), "train_file": str(train_file)}
    real = train_on_ranks(1, [record], tmp_path / "ranks", **fixed)["real"]
    config = tmp_path / "run.yaml"
    config.write_text(to_yaml(config_of(record, **fixed)))
    program = (
        "import runpy, sys, json; sys.argv[1:] = sys.argv[2:]; "
        f"print(json.dumps(runpy.run_path({str(ROOT / 'docs/examples/minimal_train.py')!r})['main'](sys.argv[1], [])))"
    )
    prepared = "import torch; from ftray.model.hardware import make_deterministic; make_deterministic(num_threads=1); "
    done = subprocess.run(
        [sys.executable, "-c", prepared + program, "", str(config)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == real.losses
