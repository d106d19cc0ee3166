"""The notebook of docs/examples, run whole by nbconvert; on the tiny model, which learns its rows as well."""

from pathlib import Path

import nbformat
from nbconvert.preprocessors import ExecutePreprocessor

NOTEBOOK = Path(__file__).parents[2] / "docs/examples/first_adapter.ipynb"
BASE = 'base_model = "smollm2-135m"'


def test_the_notebook_runs_from_top_to_bottom(tiny_model, tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)  # it has a session of its own, as a reader's kernel
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (cell,) = [cell for cell in notebook.cells if BASE in cell.source]
    cell.source = cell.source.replace(BASE, f'base_model = "{tiny_model}"')
    ExecutePreprocessor(timeout=300, kernel_name="python3").preprocess(notebook, {"metadata": {"path": str(tmp_path)}})
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "exact match 0% -> " in printed
    assert printed.count("intents@1 ->") == 1
    assert "http://127.0.0.1:" in printed
