"""The notebook runs from its first cell to its last, and a result shows itself in it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

NOTEBOOK = Path(__file__).parent.parent / "notebooks/quickstart.ipynb"


@pytest.fixture
def kernels(tmp_path, monkeypatch):
    """Kernels of this very Python, whatever else is registered on the machine."""
    spec = tmp_path / "share/jupyter/kernels/python3"
    spec.mkdir(parents=True)
    command = f'["{sys.executable}", "-m", "ipykernel_launcher", "-f", "{{connection_file}}"]'
    (spec / "kernel.json").write_text(f'{{"argv": {command}, "display_name": "Python 3", "language": "python"}}')
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "share/jupyter"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))


def run(model_path: str, monkeypatch) -> nbformat.NotebookNode:
    monkeypatch.setenv("MODEL_PATH", model_path)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    return notebook


def output(notebook: nbformat.NotebookNode, source: str, kind: str) -> str:
    """What the cell with `source` in it gave, of one kind."""
    (cell,) = [cell for cell in notebook.cells if cell.cell_type == "code" and source in cell.source]
    return "".join(item.get("text") or item["data"].get(kind, "") for item in cell.outputs)


def test_every_cell_runs_and_a_result_shows_itself(base_folder, kernels, monkeypatch):
    notebook = run(str(base_folder), monkeypatch)
    assert output(notebook, "drawn = ", "image/png")
    shown = output(notebook, "result = inference.generate", "text/html")
    assert 'class="crop-trace"' in shown
    assert "data:image/png" in shown
    assert "truth:" in output(notebook, "shape.stripes)", "text/plain")
    assert output(notebook, "inference.stream(", "text/plain").strip()
    assert "of 8 right" in output(notebook, "execute_crops=False", "text/plain")


def test_without_a_model_it_says_what_to_do(kernels, monkeypatch):
    with pytest.raises(CellExecutionError, match="there is no model at /gone: run `make demo`, or set MODEL_PATH"):
        run("/gone", monkeypatch)


def test_it_is_kept_without_outputs():
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    assert [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")] == []
    assert os.path.getsize(NOTEBOOK) < 20_000
