"""`import ftray` from Python, whole: train on rows in memory, look at the run, publish, talk, serve."""

import pytest
from tiny import chat_rows

import ftray

pytestmark = pytest.mark.usefixtures("ray_session")


def test_from_rows_to_an_answering_adapter(tiny_model, tmp_path, serve_port):
    config = {
        "name": "notebook",
        "base_model": str(tiny_model),
        "max_steps": 4,
        "data": {"max_example_tokens": 128},
        "adapter": {"rank": 4, "alpha": 8.0},
        "batch": {"examples_per_step": 8, "tokens_per_micro_batch": 512},
        "evaluation": {"every": 2},
        "runs_dir": str(tmp_path / "runs"),
    }
    seen, lines = [], []
    given = {"data": chat_rows(24), "eval_data": chat_rows(8, seed=1), "callbacks": [seen.append], "log": lines.append}
    run = ftray.train(config, "optimizer.learning_rate=1e-2", **given)
    assert run.result is not None
    assert run.result["steps"] == 4
    assert [record["step"] for record in seen if "loss" in record] == [1, 2, 3, 4]
    assert list(run.metrics["step"]) == [1, 2, 2, 3, 4, 4]
    assert run.adapter is not None
    assert run.report.is_file()
    assert run.config.optimizer.learning_rate == 1e-2
    again = ftray.Run.open(run.directory).resume(log=lines.append)
    assert again.result == run.result
    assert any("is finished already" in line for line in lines)

    class Enough(Exception):
        pass

    def stop(record):
        if record["step"] == 2:
            raise Enough

    with pytest.raises(Enough):
        ftray.train(config, "name=stopped", "max_steps=60", **given | {"callbacks": [stop]})
    stopped = ftray.Run.open(tmp_path / "runs" / "stopped")
    assert [path.name for path in (stopped.directory / "checkpoints").glob("step-*")] != []
    assert stopped.resume(log=lines.append).result["steps"] == 60

    result = ftray.evaluate(run.config, adapter=run.adapter)
    assert len(result.answers) == 8
    registry = str(tmp_path / "registry")
    assert run.publish(registry=registry, alias="prod") == run.publish(registry=registry) == "notebook@1"
    assert ftray.Registry(registry).aliases("notebook") == {"prod": 1}
    how = {"temperature": 0, "max_tokens": 6}
    model = ftray.load("notebook@prod", registry=registry)
    answer = model.chat("where is my card", **how)
    model.close()

    settings = {
        "base_model": str(tiny_model),
        "port": serve_port,
        "engine": {"context_tokens": 256, "kv_cache_tokens": 4096},
        "adapters": {"registry": registry},
    }
    with ftray.serve(settings) as endpoint:
        assert endpoint.chat("notebook@prod", "where is my card", **how) == answer
